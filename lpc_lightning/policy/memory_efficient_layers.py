"""Decoder layers that keep less for the backward pass, and say the same to the last bit.

As published, a Llama layer in mixed precision keeps normalised states in float32, a copy of them for each projection
that reads them, and four states inside its MLP. Here it keeps what is normalised, one copy, and two states. The rest is
worked out again, as far as that takes no matrix product. Gradients differ by rounding, and are no less exact.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def make_memory_efficient(layers: list[nn.Module]) -> None:
    """Have decoder layers keep less, in parts of known kinds that are found to say the same. Names stay.

    Args:
        layers: Decoder layers of a transformers model with its weights, before an adapter is put in.
    """
    parts: list[Any] = [part for layer in layers for part in layer.modules()]
    for part in parts:
        children = dict(part.named_children())
        if {"gate_proj", "up_proj", "down_proj", "act_fn"} == children.keys():
            _become(part, GatedMLP, part.gate_proj.in_features)
        elif type(part).__name__.endswith("RMSNorm") and hasattr(part, "variance_epsilon"):
            _become(part, RMSNorm, part.weight.shape[0])
        elif {"q_proj", "k_proj", "v_proj"} <= children.keys() and _takes(part, "hidden_states"):
            part.register_forward_pre_hook(_cast_once, with_kwargs=True)


def make_published(layers: list[nn.Module]) -> None:
    """Give decoder layers back the parts that transformers published. Names stay.

    Args:
        layers: Decoder layers, with an adapter in them or without.
    """
    for part in (part for layer in layers for part in layer.modules()):
        part.__class__ = part.__dict__.pop("_published", part.__class__)
        for number, hook in list(part._forward_pre_hooks.items()):
            if hook is _cast_once:
                del part._forward_pre_hooks[number]
                part._forward_pre_hooks_with_kwargs.pop(number, None)


class RMSNorm(nn.Module):
    """w x / rms(x) (arXiv 1910.07467), worked out in float32 and returned in the type of x. Keeps x and 1 / rms(x)."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        return _Normalise.apply(hidden_states, self.weight, self.variance_epsilon)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202). Keeps x, gate(x) and up(x)."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        x = _as_multiplied(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self._down(gate, up)
        # The second time it stops before the product with the weights: all that is to be kept is there by then.
        return checkpoint(self._down, gate, up, use_reentrant=False)

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(gate) * up)


class _Normalise(torch.autograd.Function):
    # Not `torch.nn.functional.rms_norm`: on a CPU that is made of smaller operations and keeps x and x / rms(x), both
    # in float32, as the published layer does; and in bfloat16 it rounds after the product with w, so that it says
    # otherwise.

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = torch.rsqrt(states.float().square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(states, weight, inverse)
        return weight * (states.float() * inverse).to(states.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        states, weight, inverse = ctx.saved_tensors
        normalised = states.float() * inverse
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (grad * normalised.to(states.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        pulled = (grad * weight).float()
        along = (pulled * normalised).mean(-1, keepdim=True)
        return (pulled - normalised.mul_(along)).mul_(inverse).to(states.dtype), to_weight, None


@torch.no_grad()
def _become(part: nn.Module, kind: type[nn.Module], width: int) -> None:
    """Make `part` one of `kind`, if it then says the same: families scale, clip and nest in ways of their own."""
    weight = next(part.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # On the CPU, like the generator: a trainer builds models under its own device as the default one.
    generator = torch.Generator(device="cpu").manual_seed(0)
    states = torch.randn(3, width, generator=generator, device="cpu").to(weight.device, dtype)
    theirs, published = part(states), part.__class__
    part.__class__ = kind
    if torch.equal(part(states), theirs):
        part.__dict__["_published"] = published
    else:
        part.__class__ = published


def _as_multiplied(states: Tensor) -> Tensor:
    """States in the type in which autocast multiplies them: cast once, and not for each product."""
    device = states.device.type
    if not torch.is_autocast_enabled(device) or states.dtype == torch.float64:  # which autocast leaves alone
        return states
    return states.to(torch.get_autocast_dtype(device))


def _cast_once(part: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Attention reads its states by products alone."""
    if args:
        return (_as_multiplied(args[0]), *args[1:]), options
    return args, options | {"hidden_states": _as_multiplied(options["hidden_states"])}


def _takes(part: nn.Module, argument: str) -> bool:
    return next(iter(inspect.signature(part.forward).parameters)) == argument
