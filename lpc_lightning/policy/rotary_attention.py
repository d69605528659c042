"""Attention layers with one matrix product and one rotation for queries, keys and values.

Published layers compute three products, and rotate queries and keys one after the other. Fewer operations take less
time on a GPU, where starting one can take longer than running it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lpc_lightning.policy.segment_attention import SEGMENT


class RotaryAttention(nn.Module):
    """Attention of Llama, Mistral and Qwen2 with rotary positions (arXiv 2104.09864).

    Other calls run the published layer: with a cache of keys, an adapter, quantized or float64 weights, and other
    kernels. In float64, the sums of a larger product have another order on a CPU.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    config: Any
    head_dim: int
    scaling: float
    attention_dropout: float
    _published: type[nn.Module]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within (R, T, d) states.

        Args:
            hidden_states: (R, T, d).
            position_embeddings: Cosines and sines of the positions, each (R, T, D).
            attention_mask: The mask of the kernel.
            past_key_values: The cache of keys and values in text generation.
            options: Other arguments of the kernel.

        Returns:
            (R, T, d), and None in place of the attention weights.
        """
        projections = [self.q_proj, self.k_proj, self.v_proj]
        kernel = self.config._attn_implementation
        plain = all(type(each) is nn.Linear and each.weight.dtype != torch.float64 for each in projections)
        if not plain or past_key_values is not None or kernel not in (SEGMENT, "sdpa"):
            return self._published.forward(
                self, hidden_states, position_embeddings, attention_mask, past_key_values, **options
            )
        parameters = [each.weight for each in projections], [each.bias for each in projections]
        parts = _RotatedProducts.apply(hidden_states, *position_embeddings, *parameters[0], *parameters[1])
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[kernel]
        dropout = self.attention_dropout if self.training else 0.0
        out, weights = attend(self, *parts, attention_mask, dropout=dropout, scaling=self.scaling, **options)
        return self.o_proj(out.flatten(2)), weights


class _RotatedProducts(torch.autograd.Function):
    """States (R, T, d) to rotated queries (R, H, T, D) and keys (R, G, T, D), and values (R, G, T, D)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor, *parameters: Any) -> tuple[Tensor, Tensor, Tensor]:
        weights, biases = parameters[:3], parameters[3:]
        weight = _stack(weights, states.dtype)
        flat = states.flatten(0, 1)
        product = flat @ weight.T if biases[0] is None else torch.addmm(_stack(biases, states.dtype), flat, weight.T)
        heads = product.view(*states.shape[:2], -1, cos.shape[-1])
        queries, keys, values = (len(each) // cos.shape[-1] for each in weights)
        cos, sin = cos[:, :, None], sin[:, :, None]
        rotated = _rotate(heads[:, :, : queries + keys], cos, sin).to(states.dtype)
        # A copy, so that the states before the rotation are freed.
        value = heads[:, :, -values:].clone(memory_format=torch.contiguous_format)
        ctx.heads = (queries + keys, biases[0] is not None)
        # In mixed precision, the cast weights are kept. A copy of weights in the same type is made again.
        kept = weights if weights[0].dtype == states.dtype else (weight,)
        ctx.save_for_backward(flat, cos, sin, *kept)
        ctx.sizes, ctx.dtype = [len(each) for each in weights], weights[0].dtype
        return rotated[:, :, :queries].transpose(1, 2), rotated[:, :, queries:].transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat, cos, sin, *kept = ctx.saved_tensors
        rotated, biased = ctx.heads
        grad = torch.cat([each.transpose(1, 2) for each in gradients], dim=2)
        turned = grad[:, :, :rotated]
        turned.copy_(_rotate_back(turned, cos, sin))
        product = grad.flatten(2).flatten(0, 1)
        states_gradient, parameter_gradients = None, [None] * 6
        if ctx.needs_input_grad[0]:
            states_gradient = (product @ (kept[0] if len(kept) == 1 else torch.cat(kept))).view(*grad.shape[:2], -1)
        if any(ctx.needs_input_grad[3:6]):
            parameter_gradients[:3] = (product.T @ flat).to(ctx.dtype).split(ctx.sizes)
        if biased and any(ctx.needs_input_grad[6:]):
            parameter_gradients[3:] = product.sum(0).to(ctx.dtype).split(ctx.sizes)
        needed = zip(parameter_gradients, ctx.needs_input_grad[3:], strict=True)
        return states_gradient, None, None, *(gradient if need else None for gradient, need in needed)


def _stack(parts: Any, dtype: torch.dtype) -> Tensor:
    """Join the rows of tensors in another type, in one pass."""
    rows = sum(len(part) for part in parts)
    return torch.cat(parts, out=torch.empty(rows, *parts[0].shape[1:], dtype=dtype, device=parts[0].device))


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of values (i, i + D/2) by its angle, with the roundings of the published formula."""
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    out = heads * cos
    out[..., :half].sub_(second * sin[..., :half])
    out[..., half:].add_(first * sin[..., half:])
    return out


def _rotate_back(gradient: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiply a gradient by the transposed matrix of `_rotate`."""
    half = gradient.shape[-1] // 2
    first, second = gradient[..., :half], gradient[..., half:]
    out = gradient * cos
    out[..., :half].addcmul_(second, sin[..., half:])
    out[..., half:].addcmul_(first, sin[..., :half], value=-1)
    return out
