"""Compiled decoder layers. All layers share their programs: one for each shape of a batch, or one for all shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lpc_lightning.policy.cast_weights import cast_weights

PROGRAMS = 1024
"""Limit of torch for the programs of a layer class in a policy. A run has a few for each of its planned shapes: with
and without gradients, with and without adapter."""

Shape = tuple[int, ...]


class CompiledLayers:
    """Decoder layers with a compiled `forward`. Hooks around it (those of FSDP2 or a user) are not compiled.

    With few shapes, batches of a planned shape run compiled, and all other calls run uncompiled. Text generation and
    benchmark requests have a new shape at almost every call, and each would be compiled again.
    """

    def __init__(self, layers: Sequence[nn.Module], few_shapes: bool, backend: str = "inductor") -> None:
        """Replace the `forward` of the layers. Compilation is at the first call.

        Args:
            layers: The layers of a policy. Shard them before.
            few_shapes: True: one whole program for each shape of a packed batch. False: one program for all shapes.
                `segment` attention is then not compiled, since its loop over segments differs between batches.
            backend: Backend of `torch.compile`.
        """
        for limit in ("recompile_limit", "accumulated_recompile_limit"):
            setattr(torch._dynamo.config, limit, max(PROGRAMS, getattr(torch._dynamo.config, limit)))
        self._shapes: set[Shape] | None = set() if few_shapes else None
        forwards = {kind: _Forward(kind, self._shapes, backend) for kind in {type(layer) for layer in layers}}
        for layer in layers:
            # A bound method: a deep copy of the layer binds it to the copy.
            layer.forward = MethodType(forwards[type(layer)], layer)

    def runs(self, shape: Sequence[int], planned: bool = False) -> bool:
        """Return True if packed batches of (R, T) tokens run compiled. A planned shape does, from now on."""
        if self._shapes is None:
            return True
        if planned:
            self._shapes.add(tuple(shape))
        return tuple(shape) in self._shapes


class _Forward:
    """Compiled and uncompiled `forward` of one class of layers."""

    def __init__(self, kind: type[nn.Module], shapes: set[Shape] | None, backend: str) -> None:
        self._uncompiled: Callable[..., Any] = kind.forward
        whole = shapes is not None
        self._compiled = torch.compile(_copy(kind.forward), backend=backend, fullgraph=whole, dynamic=not whole)
        # For DDP, torch would cut each program at the weights of a bucket, so that gradients are exchanged during the
        # backward pass. Programs of single layers allow that without a cut.
        self._uncut = torch._dynamo.config.patch(optimize_ddp=False)
        self._shapes = shapes

    def __call__(self, layer: nn.Module, *args: Any, **options: Any) -> Any:
        states: Tensor = args[0] if args else options["hidden_states"]
        # Shapes are never removed, so that a checkpointed layer is recomputed by the same program.
        known = self._shapes is None or tuple(states.shape[:2]) in self._shapes
        if not known or options.get("past_key_values") is not None:
            return self._uncompiled(layer, *args, **options)
        inside_ddp = DistributedDataParallel._get_active_ddp_module() is not None
        with self._uncut if inside_ddp else nullcontext():
            if self._shapes is None:  # weights that are no parameters would be compiled with sizes that vary
                return self._compiled(layer, *args, **options)
            with cast_weights(layer, states.device.type):
                return self._compiled(layer, *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return self


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function with its code. torch counts and searches programs by code, which all policies of a class share.

    After many fits in one process, the programs of earlier fits would reach the limit.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy
