"""Tests of the programs of a GPU, compiled on a CPU: few whole programs of layers and head, with equal values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import metrics
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lpc_lightning.data.batching.layouts import FixedShapesLayout, Layout
from lpc_lightning.policy import CausalPolicy, LoRA, compiled_layers, logprobs
from lpc_lightning.policy.compiled_layers import CompiledLayers
from lpc_lightning.policy.logprobs import token_logps, token_logps_per_code
from lpc_lightning.types import LogitHead, PreferenceBatch, TokenizedPair
from tests.fixtures.policies import piece_table

Tiny = Callable[..., CausalPolicy]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # torch's compiler makes instances of the autograd functions that it traces.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def epoch(make_pairs: Callable[..., list[TokenizedPair]]) -> list[PreferenceBatch]:
    """Batches of two shapes, the last one smaller, as in a run on a GPU."""
    generator = torch.Generator().manual_seed(0)
    lengths = [tuple(torch.randint(1, 60, (3,), generator=generator).tolist()) for _ in range(22)]
    pairs = make_pairs(lengths)
    batches = [pairs[start : start + 4] for start in range(0, 22, 4)]
    layout: Layout = FixedShapesLayout(0, None).for_batches(map(piece_table, batches))
    return [layout(batch) for batch in batches]


def outcome(policy: CausalPolicy, batch: PreferenceBatch, codes: Tensor) -> list[Tensor]:
    """Return log-probabilities without z, under z and under all codes, and the gradients of a sum of them."""
    policy.zero_grad(set_to_none=True)
    forward = policy(batch)
    z = codes[torch.arange(batch.pairs) % len(codes)]
    logps = [forward.logps(), forward.logps(z), forward.logps_per_code(codes)]
    sum(each.square().mean() for each in logps).backward()
    return [each.detach() for each in logps] + [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def assert_near(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= share * theirs.abs().max()


ADAPTER = LoRA(rank=2, alpha=4, target_modules=["q_proj", "down_proj"])  # a trace of all seven layers takes seconds
WAYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "gpt2": {"family": "gpt2"},
    "gemma2": {"family": "gemma2", "attention": "eager"},
    "adapter": {"lora": ADAPTER},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpointed adapter": {"lora": ADAPTER, "gradient_checkpointing": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_programs_one_for_each_shape(
    way: dict[str, Any], epoch: list[PreferenceBatch], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expect one program per shape, no graph break, and the values of eager mode within rounding."""
    monkeypatch.setattr(logprobs, "_compiled", lambda function: function)  # the head has another test
    plain, compiled = twins(tiny, **way)
    compiled.compile_layers("aot_eager", few_shapes=True)
    codes = torch.randn(3, plain.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    seen: set[torch.Size] = set()
    # The third shape shows that the second did not make the sizes of a program dynamic, which no layer decides.
    batches = [*epoch[:3], *(epoch[4:5] if not way else [])]
    for batch in batches:
        before = counters["stats"]["unique_graphs"]
        assert_near(outcome(compiled, batch, codes), outcome(plain, batch, codes), 1e-4)
        made = counters["stats"]["unique_graphs"] - before
        assert (made == 0) == (batch.input_ids.shape in seen)
        seen.add(batch.input_ids.shape)
    assert len(seen) == len(batches) - 1
    assert not counters["graph_break"]


def twins(tiny: Tiny, **settings: Any) -> list[CausalPolicy]:
    policies = []
    for _ in range(2):
        torch.manual_seed(0)  # for adapters
        policies.append(tiny(**{"dtype": "float32", "attention": "sdpa", "context": 256, "width": 32, **settings}))
    return policies


SHAPE_OF = {False: 0, True: -1}
"""Batch of the epoch in float32 and in bf16-mixed, one of each shape: its kernels are compiled for half a minute."""


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
def test_inductor_agrees(mixed: bool, epoch: list[PreferenceBatch], tiny: Tiny) -> None:
    plain, compiled = twins(tiny)
    compiled.compile_layers(few_shapes=True)
    codes = torch.randn(3, plain.width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    batch = epoch[SHAPE_OF[mixed]]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        assert_near(outcome(compiled, batch, codes), outcome(plain, batch, codes), 0.05 if mixed else 1e-4)


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16-mixed"])
def test_inductor_layer_has_few_kernels(mixed: bool, epoch: list[PreferenceBatch], tiny: Tiny) -> None:
    """Count the kernels of forward and backward. Matrix products and attention are library calls and not counted."""
    _, compiled = twins(tiny)
    compiled.compile_layers(few_shapes=True)
    batch = epoch[SHAPE_OF[mixed]]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        states = compiled.hidden(batch)
    states.square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert 0 < metrics.generated_kernel_count <= 40


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_layers_keep_no_casts(checkpointing: bool, epoch: list[PreferenceBatch], tiny: Tiny) -> None:
    """Count casts of projections to bfloat16 among the tensors that are kept for the backward pass."""
    plain, compiled = twins(tiny, gradient_checkpointing=checkpointing)
    compiled.compile_layers("aot_eager", few_shapes=True)
    compiled._compiles_head = False
    sizes = {tuple(weight.shape) for weight in compiled.layers[0].mlp.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.bfloat16 and {tuple(tensor.shape), tuple(tensor.mT.shape)} & sizes:
            kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            states = compiled.hidden(epoch[0])
        expected = plain.hidden(epoch[0])
    assert_near([states], [expected], 0.05)
    assert bool(kept) is not checkpointing
    states.square().mean().backward()
    expected.square().mean().backward()
    found, others = ([p.grad for p in each.parameters() if p.grad is not None] for each in (compiled, plain))
    assert_near(found, others, 0.05)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_block_sparse_rows_agree(epoch: list[PreferenceBatch], tiny: Tiny) -> None:
    """Expect one program for all masks of a shape. Forward only: flex_attention has no backward pass on a CPU."""
    plain, compiled = twins(tiny, attention="auto")
    compiled.compile_layers(few_shapes=True)
    assert compiled.block_sparse
    compiled._compiles_head = False
    for batch in [batch for batch in epoch if batch.input_ids.shape == epoch[0].input_ids.shape]:
        assert_near([compiled(batch).logps()], [plain(batch).logps()], 1e-4)
        assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("family", "sparse"), [("llama", True), ("mistral", True), ("gpt2", False)])
def test_families_that_skip_blocks(family: str, sparse: bool, tiny: Tiny) -> None:
    """GPT-2 reads the dimensions of its mask, and a mask of blocks has none: compiled layers get a whole one."""
    policy = tiny(family, attention="auto", width=32, dtype="float32")
    policy.compile_layers("eager", few_shapes=True)
    assert policy.takes_block_mask
    assert policy.block_sparse == sparse


@pytest.mark.parametrize("settings", [{"width": 16, "dtype": "float32"}, {"width": 32, "dtype": "float64"}])
def test_refused_heads_skip_no_blocks(settings: dict[str, Any], tiny: Tiny) -> None:
    """Triton multiplies heads of at least 16 dimensions, and adds in float32."""
    policy = tiny(attention="auto", **settings)
    policy.compile_layers("eager", few_shapes=True)
    assert policy.takes_block_mask
    assert not policy.block_sparse


def test_converted_policy_skips_no_blocks(tiny: Tiny) -> None:
    """A trainer with `64-true` converts the weights after they are compiled."""
    policy = tiny(attention="auto", width=32, dtype="float32")
    policy.compile_layers("eager", few_shapes=True)
    assert policy.block_sparse
    assert not policy.double().block_sparse


def test_other_calls_run_uncompiled(epoch: list[PreferenceBatch], tiny: Tiny) -> None:
    """Call the model directly, as generation and benchmarks do with any shape."""
    _, compiled = twins(tiny)
    compiled.compile_layers("aot_eager", few_shapes=True)
    compiled.causal_lm(input_ids=epoch[0].input_ids[:, :50], use_cache=True)
    assert counters["stats"]["unique_graphs"] == 0
    twin = copy.deepcopy(compiled)
    assert all(layer.forward.__self__ is layer for layer in twin.layers)  # type: ignore[attr-defined]


class Doubled(nn.Module):
    """A decoder layer that is compiled in milliseconds."""

    def forward(self, hidden_states: Tensor, *, factor: float = 2.0) -> Tensor:
        return factor * hidden_states


def test_planned_shapes_all_run_compiled() -> None:
    """Expect a program for each planned shape, however many came before, and none for another shape."""
    layer = Doubled()
    layers = CompiledLayers([layer], few_shapes=True, backend="eager")
    shapes = [(1, width) for width in range(32, 32 + 14)]
    for count, shape in enumerate(shapes, 1):
        assert not layers.runs(shape)
        assert layers.runs(shape, planned=True)
        assert torch.equal(layer(torch.ones(*shape, 3)), torch.full((*shape, 3), 2.0))
        assert counters["stats"]["unique_graphs"] == count
    assert all(map(layers.runs, shapes))
    layer(torch.ones(1, 7, 3))
    assert counters["stats"]["unique_graphs"] == len(shapes)


def test_policies_do_not_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit policies of one class one after the other, with shapes of their own."""
    monkeypatch.setattr(compiled_layers, "PROGRAMS", 0)
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=3):
        for policy in range(4):
            layer = Doubled()
            layers = CompiledLayers([layer], few_shapes=True, backend="eager")
            for width in (8 + policy, 16 + policy):
                assert layers.runs((1, width), planned=True)
                layer(torch.ones(1, width, 3))
        assert counters["stats"]["unique_graphs"] == 8


def test_unplanned_training_batch_warns(
    epoch: list[PreferenceBatch], make_pairs: Callable[..., list[TokenizedPair]], tiny: Tiny
) -> None:
    plain, compiled = twins(tiny, attention="auto")
    compiled.compile_layers("eager", few_shapes=True)
    batch = FixedShapesLayout(0, None)(make_pairs([(5, 3, 7), (11, 9, 1)]))
    assert epoch[0].planned
    assert not batch.planned
    with pytest.warns(UserWarning, match=r"policy\.compile: found a training batch whose shape .* not planned"):
        states = compiled.hidden(batch)
    assert_near([states], [plain.hidden(batch)], 1e-4)
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "bias and scale", "softcap"])
def test_compiled_head_agrees(kind: str) -> None:
    """Compare values and gradients of the compiled head for several chunk sizes, with one program."""
    options: dict[str, Any] = {"plain": {}, "bias and scale": {"scale": 0.5}, "softcap": {"softcap": 2.0}}[kind]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator).requires_grad_()
    bias = torch.randn(50, generator=generator).requires_grad_() if kind == "bias and scale" else None
    codes = torch.randn(3, 8, generator=generator).requires_grad_()
    for tokens in (20, 9, 33):
        hidden = torch.randn(tokens, 8, generator=generator).requires_grad_()
        targets = torch.randint(50, (tokens,), generator=generator)
        group = torch.randint(3, (tokens,), generator=generator)
        results = []
        for compiled in (True, False):
            head = LogitHead(weight, bias, compiled=compiled, **options)
            values = [token_logps(hidden, targets, head), token_logps(hidden, targets, head, codes, group)]
            values.append(token_logps_per_code(hidden, targets, head, codes))
            frozen = replace(head, weight=weight.detach(), bias=None if bias is None else bias.detach())
            values += [
                token_logps(hidden, targets, frozen),
                token_logps(hidden, targets, frozen, codes.detach(), group),
            ]
            leaves = [leaf for leaf in (hidden, weight, bias, codes) if leaf is not None]
            results.append([*values, *torch.autograd.grad(sum(v.square().sum() for v in values), leaves)])  # type: ignore[arg-type]
        assert_near(*results, share=1e-5)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharded_layers_compile_whole(
    checkpointing: bool, mesh: DeviceMesh, epoch: list[PreferenceBatch], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compile layers within FSDP2's hooks, where weights are whole."""
    monkeypatch.setattr(logprobs, "_compiled", lambda function: function)
    plain, sharded = twins(tiny, gradient_checkpointing=checkpointing)
    layers = sharded.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    assert sharded.layers == layers
    fully_shard(sharded, mesh=mesh)
    sharded.compile_layers("aot_eager", few_shapes=True)
    for batch in epoch[:2]:
        logps = [policy(batch).logps() for policy in (sharded, plain)]
        assert_near([logps[0].detach()], [logps[1].detach()], 1e-5)
        for each in logps:
            each.sum().backward()
    assert counters["stats"]["unique_graphs"] >= 1
    assert not counters["graph_break"]
    gradients = [[p.grad for p in policy.parameters() if p.grad is not None] for policy in (sharded, plain)]
    assert_near([g.full_tensor() for g in gradients[0]], gradients[1], 1e-4)  # type: ignore[attr-defined]


class Wide(nn.Module):
    """A decoder layer with weights of more than a bucket of DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(600, 600), nn.Linear(600, 600)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.other(self.one(hidden_states))


def test_ddp_does_not_cut_layers(mesh: DeviceMesh) -> None:
    programs = []

    def backend(module: Any, inputs: Any) -> Any:
        programs.append(module)
        return module.forward

    layer = Wide()
    layers = CompiledLayers([layer], few_shapes=True, backend=backend)  # type: ignore[arg-type]
    assert layers.runs((1, 4), planned=True)
    wrapped = DistributedDataParallel(layer, bucket_cap_mb=1)
    for _ in range(2):
        wrapped(torch.ones(1, 4, 600)).sum().backward()
    assert len(programs) == 1
