"""Decoder layers of fewer operations that keep less memory for the backward pass, with bitwise equal outputs.

In mixed precision, a published Llama layer keeps its normalized states in float32, a copy of them for each projection,
and four states inside its MLP. These layers keep the inputs of the norms, one copy, and two states. The backward pass
recomputes the rest without any matrix product. Gradients differ by rounding, and are equally exact.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpc_lightning.policy.rotary_attention import RotaryAttention

ROTARY = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""Published classes that `RotaryAttention` can replace."""
LARGE = 1e3
"""Factor of an input that reaches the limits at which some families clip."""


def make_memory_efficient(layers: list[nn.Module]) -> None:
    """Replace known parts of decoder layers, if their outputs stay bitwise equal. Parameter names do not change.

    Args:
        layers: Decoder layers of a transformers model with its weights, without an adapter.
    """
    parts: list[Any] = [part for layer in layers for part in layer.modules()]
    for part in parts:
        children = dict(part.named_children())
        if {"gate_proj", "up_proj", "down_proj", "act_fn"} == children.keys():
            _replace_class(part, GatedMLP, (3, part.gate_proj.in_features))
        elif type(part).__name__.endswith("RMSNorm") and hasattr(part, "variance_epsilon"):
            _replace_class(part, RMSNorm, (3, part.weight.shape[0]))
        elif {"q_proj", "k_proj", "v_proj"} <= children.keys() and _starts_with(part, "hidden_states"):
            part.register_forward_pre_hook(_cast_once, with_kwargs=True)
            if type(part).__name__ in ROTARY:
                _replace_class(part, RotaryAttention, (1, 3, part.q_proj.in_features), part.head_dim)


def restore_published(layers: list[nn.Module]) -> None:
    """Undo `make_memory_efficient`. Parameter names do not change.

    Args:
        layers: Decoder layers, with or without an adapter.
    """
    for part in (part for layer in layers for part in layer.modules()):
        part.__class__ = part.__dict__.pop("_published", part.__class__)
        for number, hook in list(part._forward_pre_hooks.items()):
            if hook is _cast_once:
                del part._forward_pre_hooks[number]
                part._forward_pre_hooks_with_kwargs.pop(number, None)


class RMSNorm(nn.Module):
    """w x / rms(x) (arXiv 1910.07467), computed in float32 and returned in the type of x. Keeps x and 1 / rms(x)."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize (..., d) states."""
        return _Normalize.apply(hidden_states, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202). Keeps x, gate(x) and up(x)."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) states to (..., d)."""
        x = _cast_for_products(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self._down(gate, up)
        # The recomputation ends before the product with the weights, when all saved states exist.
        return checkpoint(self._down, gate, up, use_reentrant=False)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(gate) * up)


class _Normalize(torch.autograd.Function):
    # Not `torch.nn.functional.rms_norm`, for two reasons. On a CPU it consists of smaller operations, and keeps x and
    # x / rms(x) in float32, as the published layer does. In bfloat16 it rounds after the product with w, so that its
    # outputs differ from the published ones.

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        exact = states.float()
        inverse = exact.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return weight * (exact * inverse).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, weight, inverse = ctx.saved_tensors
        normalized = states * inverse  # in float32 or wider
        width = states.shape[-1]
        product = (grad * normalized).reshape(-1, width)  # transposed behind a norm of heads
        weight_gradient = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        exact_weight = weight.to(normalized.dtype)
        # Sums of product * weight over the width, divided by it. With beta = 0, the first argument is not used.
        projection = torch.addmv(product[:, 0], product, exact_weight, beta=0, alpha=1 / width).view_as(inverse)
        gradient = (grad * exact_weight).addcmul_(normalized, projection, value=-1).mul_(inverse)
        return gradient.to(states.dtype), weight_gradient, None


@torch.no_grad()
def _replace_class(part: nn.Module, kind: type[nn.Module], shape: tuple[int, ...], angles: int | None = None) -> None:
    """Change the class of `part` to `kind` if its outputs stay equal. Families can scale, clip, cast or nest them.

    Args:
        part: The part, with its weights.
        kind: The new class.
        shape: Shape of inputs to compare the outputs for.
        angles: Number of rotary angles of each position, or None for a part without positions.
    """
    weight = next(part.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # Explicitly on the CPU, as the generator is: a trainer builds models with another default device.
    generator = torch.Generator(device="cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(weight.device, dtype)

    states, options = draw(*shape), {}
    if angles is not None:
        positions = (*shape[:-1], angles)
        options = {"position_embeddings": (draw(*positions), draw(*positions)), "attention_mask": None}
    else:
        states[-1] *= LARGE
    # A norm changes in training, and its first values of 1 hide roundings.
    weights = {"weight": draw(shape[-1])} if kind is RMSNorm else {}

    def run(mixed: bool) -> Tensor:
        # In mixed precision, norms read results of products, in 16 bits, and MLPs read results of norms.
        own = states.bfloat16() if mixed and kind is RMSNorm else states
        with torch.autocast(states.device.type, torch.bfloat16, enabled=mixed):
            out = torch.func.functional_call(part, weights, own, options)
        return out[0] if isinstance(out, tuple) else out

    precisions = [False, True] if weight.dtype == torch.float32 and angles is None else [False]
    published, expected = part.__class__, [run(each) for each in precisions]
    part.__class__, part.__dict__["_published"] = kind, published
    if not all(map(_are_equal, map(run, precisions), expected)):
        part.__class__ = part.__dict__.pop("_published")


def _are_equal(found: Tensor, expected: Tensor) -> bool:
    """Compare types and values. A large input in 16 bits may give values that are not finite."""
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


def _cast_for_products(states: Tensor) -> Tensor:
    """Cast states to the type of autocast's products: once, instead of once for each product."""
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype == torch.float64:  # autocast does not cast float64
        return states
    return states.to(torch.get_autocast_dtype(device))


def _cast_once(part: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Cast the inputs of an attention layer. It uses them in matrix products only."""
    if args:
        return (_cast_for_products(args[0]), *args[1:]), options
    return args, options | {"hidden_states": _cast_for_products(options["hidden_states"])}


def _starts_with(part: nn.Module, argument: str) -> bool:
    return next(iter(inspect.signature(part.forward).parameters)) == argument
