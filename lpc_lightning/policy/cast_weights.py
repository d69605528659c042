"""Casts of a layer's weights to autocast's type, in one kernel, before the layer runs.

Autocast casts each weight by a kernel of its own, and each gradient by another one. It does not cast the stacked
weights of experts, whose products transformers computes in the type of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.pytorch_utils import Conv1D

MATRIX_PRODUCTS = (nn.Linear, Conv1D)
"""Modules whose weights autocast casts. A subclass can use its weights differently, and is left to autocast."""


@contextmanager
def cast_weights(layer: nn.Module, device: str) -> Iterator[None]:
    """Replace the float32 weights of matrix products by casts of them, if autocast is on. Gradients reach the weights.

    The casts exist until the backward pass. FSDP2 frees whole weights earlier, so that its layers are not changed. Of a
    layer that is recomputed, only experts are cast. transformers checkpoints it inside its `forward`, where autocast
    makes the casts again in the backward pass.

    Args:
        layer: A decoder layer.
        device: Type of its device.
    """
    dtype = torch.get_autocast_dtype(device)
    kinds = () if layer.training and getattr(layer, "gradient_checkpointing", False) else MATRIX_PRODUCTS
    applies = torch.is_autocast_enabled(device) and not isinstance(layer, FSDPModule)
    owners = [
        (module._parameters, name)
        for module in (layer.modules() if applies else ())
        for name, weight in module._parameters.items()
        if weight is not None
        and weight.dtype == torch.float32
        and (type(module) in kinds or _is_of_experts(module, weight))
    ]
    if not owners:
        yield
        return
    weights = [parameters[name] for parameters, name in owners]
    try:
        for (parameters, name), cast in zip(owners, _Cast.apply(dtype, *weights), strict=True):
            parameters[name] = cast
        yield
    finally:
        for (parameters, name), weight in zip(owners, weights, strict=True):
            parameters[name] = weight


def _is_of_experts(module: nn.Module, weight: Tensor) -> bool:
    # transformers adds `_apply_gate` to each class of experts that its kernels compute. Biases have two dimensions.
    return weight.dim() == 3 and hasattr(type(module), "_apply_gate")


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        cast = _copies(weights, dtype)
        ctx.mark_non_differentiable(
            *(c for c, needed in zip(cast, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        ctx.set_materialize_grads(False)
        return tuple(cast)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        exact = iter(_copies([gradient for gradient in gradients if gradient is not None], torch.float32))
        return None, *(None if gradient is None else next(exact) for gradient in gradients)


def _copies(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
