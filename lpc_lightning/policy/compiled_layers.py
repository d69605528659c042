"""Decoder layers as compiled programs, which all layers share: one for each shape of a batch, or one for any shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

MOST_SHAPES = 12
"""Shapes of batches that are compiled at most. Batches of further shapes run uncompiled."""
PROGRAMS = 64
"""Programs that torch may keep of a layer class: for each shape, with and without gradient, with adapter on and off."""

Shape = tuple[int, ...]


class CompiledLayers:
    """Replaces the `forward` of decoder layers. Hooks around it (FSDP2's, a user's) stay outside the program.

    With few shapes, packed batches run compiled, and every other call runs the layer as it is written: text generation
    and benchmark requests have a new shape at almost every call, so that compiling them would never end.
    """

    def __init__(self, layers: Sequence[nn.Module], few_shapes: bool, backend: str = "inductor") -> None:
        """Compile at the first call.

        Args:
            layers: The layers of a policy, sharded already where they are to be.
            few_shapes: One whole program for each shape of a packed batch. Otherwise one for rows of any number and
                width, with attention by segment outside, as a loop over segments that differ from batch to batch.
            backend: Of `torch.compile`.
        """
        limit = "recompile_limit"
        setattr(torch._dynamo.config, limit, max(PROGRAMS, getattr(torch._dynamo.config, limit)))
        self._shapes: set[Shape] | None = set() if few_shapes else None
        forwards = {kind: _Forward(kind, self._shapes, backend) for kind in {type(layer) for layer in layers}}
        for layer in layers:
            # A bound method, which a deep copy of the layer binds to the copy.
            layer.forward = MethodType(forwards[type(layer)], layer)

    def takes(self, shape: Sequence[int]) -> bool:
        """Return whether a packed batch of (R, T) tokens runs compiled; notes the shape if there is room for it."""
        if self._shapes is None:
            return True
        if len(self._shapes) < MOST_SHAPES:
            self._shapes.add(tuple(shape))
        return tuple(shape) in self._shapes


class _Forward:
    """The `forward` of one class of layers."""

    def __init__(self, kind: type[nn.Module], shapes: set[Shape] | None, backend: str) -> None:
        self._as_written: Callable[..., Any] = kind.forward
        whole = shapes is not None
        self._compiled = torch.compile(kind.forward, backend=backend, fullgraph=whole, dynamic=not whole)
        self._shapes = shapes

    def __call__(self, layer: nn.Module, *args: Any, **options: Any) -> Any:
        states: Tensor = args[0] if args else options["hidden_states"]
        # The same answer when a checkpointed layer is computed again: shapes are never removed.
        known = self._shapes is None or tuple(states.shape[:2]) in self._shapes
        run = self._compiled if known and options.get("past_key_values") is None else self._as_written
        return run(layer, *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        return self
