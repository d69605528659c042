"""CUDA graphs of a backbone's forward and backward pass, one pair for each shape of a packed batch.

A GPU computes a layer of a small model faster than Python launches its kernels. A graph launches all of them at once.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lpc_lightning.errors import one_line

Backbone = Callable[..., Tensor]
"""From token ids, attention mask, segments and positions of a batch to (R, T, d) last hidden states."""
ERRORS = "thread_local"
"""Other threads, such as one that pins batches, may call CUDA during a capture."""
WARM_UP = 2
"""Passes before a capture. They compile, choose kernels and allocate what libraries keep."""


class GraphedBackbone:
    """A backbone whose passes are replayed from CUDA graphs, in training on one device.

    All graphs share the memory of their activations and gradients. A pass runs without a graph if the backward pass of
    the previous one is still to come. The graphs are captured again if a weight or buffer moved to another address.
    """

    def __init__(self, parameters: Iterable[Tensor], buffers: Iterable[Mapping[str, Tensor | None]] = ()) -> None:
        """Keep the weights. Nothing is captured before the first call.

        Args:
            parameters: All weights of the backbone. Those without gradients are frozen; graphs read them too.
            buffers: Buffers of each module of the backbone. A conversion of the module replaces them.

        Raises:
            ValueError: The backbone trains no weight.
        """
        self._weights, self._buffers = list(parameters), list(buffers)
        self._parameters = [weight for weight in self._weights if weight.requires_grad]
        if not self._parameters:
            raise ValueError("found a backbone without trained weights, expected some: there is no backward pass")
        self._graphs: dict[tuple[Any, ...], _Graphs | None] = {}
        self._unfinished: weakref.ref[_Pass] | None = None
        self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedBackbone:
        return GraphedBackbone(deepcopy(self._weights, memo), deepcopy(self._buffers, memo))

    def release(self) -> None:
        """Release all graphs and their memory. The next call captures again."""
        self._graphs.clear()
        self._addresses: list[int] = []
        self._gradients = [torch.empty(0)] * len(self._parameters)

    def __call__(self, backbone: Backbone, *inputs: Any) -> Tensor:
        """Return (R, T, d) last hidden states, with gradients for the weights.

        Args:
            backbone: The same at every call.
            inputs: Token ids, attention mask, segments and positions, each (R, T).
        """
        is_unfinished = self._unfinished is not None and self._unfinished() is not None
        graphs = None if is_unfinished else self._graphs_of(backbone, inputs)
        if graphs is None:
            return backbone(*inputs)
        this = _Pass(graphs)
        self._unfinished = weakref.ref(this)
        states: Tensor = _Replay.apply(this, inputs, *self._parameters)
        return states

    def _graphs_of(self, backbone: Backbone, inputs: Sequence[Any]) -> _Graphs | None:
        read = [*self._weights, *(buffer for each in self._buffers for buffer in each.values() if buffer is not None)]
        addresses = [tensor.data_ptr() for tensor in read]
        if addresses != self._addresses:
            self._graphs.clear()
            self._addresses = addresses
            self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (*inputs[0].shape, autocast, torch.are_deterministic_algorithms_enabled())
        if key not in self._graphs:
            pool = next((each.pool for each in self._graphs.values() if each is not None), None)
            try:
                with torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves its own stream current
                    self._graphs[key] = _Graphs(backbone, inputs, self._parameters, self._gradients, pool)
            except RuntimeError as error:
                self._graphs[key] = None
                _leave_capture(self._weights[0])
                warnings.warn(
                    f"policy.cuda_graphs: the backbone could not be captured for batches of {key[:2]}. They train "
                    "without graphs. Expected operations that do not wait for the GPU, and memory for a second pass. "
                    f"({one_line(error)[:300]})",
                    stacklevel=2,
                )
        return self._graphs[key]


def _leave_capture(weight: Tensor) -> None:
    """Make a capture that succeeds. In torch 2.11, the generator refuses all draws after one that was cut off."""
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=ERRORS):
        weight.new_zeros(1)


class _Graphs:
    """Both graphs of one shape, and the tensors at fixed addresses that they read and write."""

    def __init__(
        self,
        backbone: Backbone,
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        pool: Any,
    ) -> None:
        self.inputs = [value.clone() for value in inputs]
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        dtype = torch.get_autocast_dtype("cuda")
        # Autocast's cache would keep casts of weights in memory that the graph reuses. The passes before a capture must
        # not change the random numbers of the step.
        with (
            torch.autocast("cuda", dtype, torch.is_autocast_enabled("cuda"), cache_enabled=False),
            torch.random.fork_rng([torch.cuda.current_device()]),
        ):
            self._warm_up(backbone, parameters)
            with torch.cuda.graph(self.forward, pool=pool, capture_error_mode=ERRORS):
                hidden = backbone(*self.inputs)
            self.pool = self.forward.pool()
            self.upstream = torch.empty_like(hidden)
            with torch.cuda.graph(self.backward, pool=self.pool, capture_error_mode=ERRORS):
                computed = torch.autograd.grad(hidden, parameters, self.upstream, allow_unused=True)
                used = [number for number, gradient in enumerate(computed) if gradient is not None]
                torch._foreach_copy_([gradients[number] for number in used], [computed[number] for number in used])
        self.hidden = hidden.detach()
        self.gradients = [gradients[number] if number in used else None for number in range(len(gradients))]

    def _warm_up(self, backbone: Backbone, parameters: Sequence[Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                hidden = backbone(*self.inputs)
                torch.autograd.grad(hidden, parameters, torch.ones_like(hidden), allow_unused=True)
        torch.cuda.current_stream().wait_stream(side)


class _Pass:
    """A forward pass. It exists until the backward pass ends, or until no tensor needs it."""

    def __init__(self, graphs: _Graphs) -> None:
        self.graphs = graphs


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, this: _Pass, inputs: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.this = this
        torch._foreach_copy_(this.graphs.inputs, list(inputs))
        this.graphs.forward.replay()
        return this.graphs.hidden.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        graphs: _Graphs = ctx.this.graphs
        graphs.upstream.copy_(upstream)
        graphs.backward.replay()
        ctx.this = None
        # Autograd copies gradients that others refer to, so that the next replay does not change them.
        return None, None, *graphs.gradients
