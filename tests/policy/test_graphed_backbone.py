"""Tests of `GraphedBackbone` on a CPU, with graphs that record operations and repeat them. See also test_cuda.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lpc_lightning.policy.graphed_backbone import GraphedBackbone

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")


class RecordedGraph:
    """The interface of `torch.cuda.CUDAGraph` on a CPU: it repeats operations on the tensors of their first run."""

    replays = 0

    def __init__(self) -> None:
        self.operations: list[tuple[Any, ...]] = []

    def pool(self) -> None:
        return

    @torch.no_grad()
    def replay(self) -> None:
        RecordedGraph.replays += 1
        for function, args, options, out in self.operations:
            tree_map(_overwrite, out, function(*args, **options))


def _overwrite(old: Any, new: Any) -> None:
    if isinstance(old, Tensor):
        old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, out))
        return out


class Stream:
    def wait_stream(self, other: Any) -> None: ...


@pytest.fixture(autouse=True)
def recorded_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(graph: RecordedGraph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
        with Recorder(graph):
            yield

    fork = torch.random.fork_rng
    monkeypatch.setattr(RecordedGraph, "replays", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork([]))


class Backbone(nn.Module):
    """Embeddings, a layer, noise, and a weight that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.layer = nn.Embedding(11, 4), nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, tokens: Tensor, mask: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        states = self.embedding(tokens) + positions[..., None]
        return torch.tanh(self.layer(states)) + 0.1 * torch.rand(states.shape)


def batch(tokens: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (1, tokens), generator=generator)
    return ids, torch.ones_like(ids), torch.zeros_like(ids), torch.arange(tokens)[None]


SIZES = [5, 7, 5, 5, 7]


def train(backbone: Backbone, graphed: GraphedBackbone | None) -> list[Tensor]:
    """Take two steps, of two and three micro-batches. The embedding is tied: the loss reads it too."""
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.5)
    seen = []
    for number, size in enumerate(SIZES):
        torch.manual_seed(number)
        inputs = batch(size, number)
        states = backbone(*inputs) if graphed is None else graphed(backbone, *inputs)
        logits = states @ backbone.embedding.weight.T
        (logits.square().mean() + torch.rand(()) * states.sum()).backward()
        seen.append(states.detach().clone())
        if number in (1, 4):
            optimizer.step()
            optimizer.zero_grad()
    return [*seen, *(each.detach().clone() for each in backbone.parameters())]


def test_training_equals_training_without_graphs() -> None:
    plain, other = Backbone(), Backbone()
    expected = train(plain, None)
    found = train(other, GraphedBackbone(other.parameters()))
    assert RecordedGraph.replays == 2 * len(SIZES)
    assert all(torch.equal(one, another) for one, another in zip(found, expected, strict=True))


def test_second_pass_before_backward_uses_no_graph() -> None:
    backbone = Backbone()
    graphed = GraphedBackbone(backbone.parameters())
    first, second = batch(5, 0), batch(5, 1)
    torch.manual_seed(0)
    expected = torch.autograd.grad((backbone(*first) * backbone(*second)).sum(), backbone.layer.weight)[0]
    torch.manual_seed(0)
    product = graphed(backbone, *first) * graphed(backbone, *second)
    assert RecordedGraph.replays == 1
    product.sum().backward()
    torch.testing.assert_close(backbone.layer.weight.grad, expected)
    assert backbone.unused.grad is None


def test_pass_without_backward_is_forgotten() -> None:
    backbone = Backbone()
    graphed = GraphedBackbone(backbone.parameters())
    for number in range(3):
        graphed(backbone, *batch(5, number))
    assert RecordedGraph.replays == 3


@pytest.mark.parametrize("frozen", [False, True])
def test_moved_weights_are_captured_again(frozen: bool) -> None:
    backbone = Backbone()
    backbone.layer.weight.requires_grad_(not frozen)
    graphed = GraphedBackbone(backbone.parameters())
    graphed(backbone, *batch(5, 0))
    backbone.layer.weight.data = 2 * backbone.layer.weight.data
    inputs = batch(5, 1)
    torch.manual_seed(0)
    expected = backbone(*inputs)
    torch.manual_seed(0)
    assert torch.equal(graphed(backbone, *inputs), expected)


def test_moved_buffers_are_captured_again() -> None:
    backbone = Backbone()
    backbone.register_buffer("scale", torch.ones(4))
    graphed = GraphedBackbone(backbone.parameters(), [part._buffers for part in backbone.modules()])

    def scaled(*inputs: Tensor) -> Tensor:
        return backbone(*inputs) * backbone.scale

    graphed(scaled, *batch(5, 0))
    backbone.scale = 2 * backbone.scale
    torch.manual_seed(0)
    expected = scaled(*batch(5, 1))
    torch.manual_seed(0)
    assert torch.equal(graphed(scaled, *batch(5, 1)), expected)


def test_released_graphs_are_captured_again() -> None:
    backbone = Backbone()
    graphed = GraphedBackbone(backbone.parameters())
    graphed(backbone, *batch(5, 0)).sum().backward()
    graphed.release()
    assert not graphed._graphs
    assert not any(map(torch.Tensor.numel, graphed._gradients))
    graphed(backbone, *batch(5, 0)).sum().backward()
    assert RecordedGraph.replays == 4


def test_copy_has_its_own_weights() -> None:
    backbone = Backbone()
    graphed = GraphedBackbone(backbone.parameters())
    graphed(backbone, *batch(5, 0))
    backbone_copy, graphed_copy = deepcopy((backbone, graphed))
    graphed_copy(backbone_copy, *batch(5, 1)).sum().backward()
    assert backbone.layer.weight.grad is None
    assert backbone_copy.layer.weight.grad is not None


def test_failed_capture_trains_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = iter([RuntimeError("operation not permitted when stream is capturing")])

    @contextmanager
    def refuse(*args: Any, **options: Any) -> Iterator[None]:
        for error in outcomes:
            raise error
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    backbone = Backbone()
    graphed = GraphedBackbone(backbone.parameters())
    inputs = batch(5, 0)
    torch.manual_seed(0)
    expected = backbone(*inputs)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing"):
        found = graphed(backbone, *inputs)
    assert torch.equal(found, expected)


class CutOff:
    """A capture that the first error cuts off, as in torch: stream and generator are left as they were inside."""

    capturing, current, failures = False, "main", 1

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __enter__(self) -> None:
        CutOff.capturing, self.before, CutOff.current = True, CutOff.current, "side"

    def __exit__(self, *error: object) -> None:
        if CutOff.failures:
            CutOff.failures -= 1
            raise RuntimeError("operation failed due to a previous error during capture")
        CutOff.capturing, CutOff.current = False, self.before


def test_failed_capture_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def stream(entered: Any) -> Iterator[None]:
        before = CutOff.current
        try:
            yield
        finally:
            CutOff.current = before

    monkeypatch.setattr(torch.cuda, "graph", CutOff)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    backbone = Backbone()
    with pytest.warns(UserWarning, match="previous error during capture"):
        GraphedBackbone(backbone.parameters())(backbone, *batch(5, 0))
    assert not CutOff.capturing
    assert CutOff.current == "main"


def test_backbone_without_trained_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="without trained weights"):
        GraphedBackbone(Backbone().requires_grad_(False).parameters())
