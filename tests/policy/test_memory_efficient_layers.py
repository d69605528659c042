"""Lean layers against the published ones: the same answers to the last bit, the same gradients, and what they keep."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from lpc_lightning.data.batching.layouts import SharedPrefixLayout
from lpc_lightning.policy import CausalPolicy, LoRA, TinyPolicy, spec
from lpc_lightning.policy.memory_efficient_layers import GatedMLP, RMSNorm
from lpc_lightning.types import PreferenceBatch

FAMILIES = ("llama", "mistral", "qwen2", "gpt2", "gemma2")


@pytest.fixture
def batch(make_pairs: Callable[..., Any]) -> PreferenceBatch:
    return SharedPrefixLayout(0, None)(make_pairs([(5, 3, 7), (11, 9, 1), (1, 1, 4)]))


@contextmanager
def published_layers() -> Iterator[None]:
    """Policies that are built here keep transformers' own layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "make_memory_efficient", lambda layers: None)
        yield


def both(perturb: Callable[..., None], *settings: Any, **more: Any) -> tuple[CausalPolicy, CausalPolicy]:
    """A policy with lean layers, and the same one with the published ones."""
    torch.manual_seed(0)  # for adapters
    lean = TinyPolicy(*settings, **more).build()
    torch.manual_seed(0)
    with published_layers():
        published = TinyPolicy(*settings, **more).build()
    for policy in (lean, published):
        perturb(policy)
    assert lean.state_dict().keys() == published.state_dict().keys()
    return lean, published


def kinds(policy: CausalPolicy) -> list[type]:
    return [type(part) for layer in policy.layers for part in layer.modules()]


def read(policy: CausalPolicy, batch: PreferenceBatch, mixed: bool) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of the answers, and the gradient of a sum of them by every parameter that is trained."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        logps = policy.read(batch).logps()
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    return logps, list(torch.autograd.grad((weights * logps).sum(), trained))


ROUNDINGS = 256 * torch.finfo(torch.float32).eps
"""Bound on a gradient's error as a share of its norm: some hundred float32 products and sums, each rounded once. Their
order depends on the processor. A wrong dropout mask changes a gradient by about its whole norm."""


def assert_near(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() <= share * other.norm()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_to_the_last_bit_and_gradients_by_rounding(
    family: str, dtype: Any, mixed: bool, batch: PreferenceBatch, perturb: Callable[..., None]
) -> None:
    lean, published = both(perturb, family, dtype=dtype)
    ours, theirs = read(lean, batch, mixed), read(published, batch, mixed)
    assert torch.equal(ours[0], theirs[0])
    # float64, too: norms go through float32.
    assert_near(ours[1], theirs[1], 0.05 if mixed or dtype == "bfloat16" else ROUNDINGS)


def test_in_bfloat16_gradients_are_as_exact_as_those_of_the_published_layers(
    batch: PreferenceBatch, perturb: Callable[..., None]
) -> None:
    lean, published = both(perturb, "llama", width=64)
    exact = read(published, batch, mixed=False)[1]

    def error(policy: CausalPolicy) -> float:
        found = read(policy, batch, mixed=True)[1]
        return sum(float((mine - other).square().sum()) for mine, other in zip(found, exact, strict=True)) ** 0.5

    assert 0 < error(lean) < 1.1 * error(published)


@pytest.mark.parametrize(
    ("family", "mlp", "norm"),
    [("llama", 1, 2), ("mistral", 1, 2), ("qwen2", 1, 2), ("gpt2", 0, 0), ("gemma2", 1, 0)],
)
def test_parts_of_known_kinds_are_lean_and_others_as_they_were(family: str, mlp: int, norm: int) -> None:
    policy = TinyPolicy(family).build()
    found = kinds(policy)
    layers = len(policy.layers)
    assert (found.count(GatedMLP), found.count(RMSNorm)) == (mlp * layers, norm * layers)
    assert type(policy.backbone.norm if family != "gpt2" else policy.backbone.ln_f) not in (GatedMLP, RMSNorm)


class _Clipped(nn.Module):
    """An MLP with the children of a gated one and an algebra of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


def test_a_part_that_only_looks_like_one_is_left_alone() -> None:
    part = _Clipped()
    spec.make_memory_efficient([nn.Sequential(part)])
    assert type(part) is _Clipped


def kept(run: Callable[[], Tensor], tokens: int) -> int:
    """Bytes that `run` keeps for the backward pass, of tensors that have a value for each token."""
    storages: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tokens in tensor.shape:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        result = run()
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def states(policy: CausalPolicy, tokens: int) -> Tensor:
    """The hidden states of one row."""
    row = torch.arange(tokens)[None]
    return policy.states(row, torch.ones_like(row), torch.zeros_like(row), row)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_torchs_own_norm_keeps_a_second_copy(dtype: torch.dtype, size: int) -> None:
    """If this fails, torch has become better: its `rms_norm` may do in place of ours."""
    tokens, width = 37, 32
    lean = next(part for part in TinyPolicy(width=width).build().layers[0].modules() if isinstance(part, RMSNorm))
    norm, x = lean.to(dtype), torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    assert kept(lambda: norm(x), tokens) == tokens * (size * width + 4)
    assert kept(lambda: rms_norm(x, (width,), norm.weight, 1e-6), tokens) == tokens * (2 * 4 * width + 4)


def test_a_layer_keeps_what_is_normalised_once_what_is_multiplied_once_and_attention() -> None:
    tokens, width = 37, 32

    def layer(**settings: Any) -> int:
        policies = [TinyPolicy(width=width, heads=4, layers=n, **settings).build() for n in (2, 1)]
        two, one = (kept(partial(states, policy, tokens), tokens) for policy in policies)
        return two - one

    config = TinyPolicy(width=width, heads=4, layers=1).load_config()
    head = width // 4
    attention = 2 * (2 * width + 2 * head * config.num_key_value_heads)  # queries, outputs, keys, values: bfloat16
    norms = 2 * (4 * width + 4 + 2 * width)  # the input and 1 / rms in float32, the copy that is multiplied in bfloat16
    assert layer() == tokens * (norms + attention + 2 * 2 * config.intermediate_size)
    with published_layers():
        assert layer() > 1.7 * tokens * (norms + attention + 2 * 2 * config.intermediate_size)


def test_what_is_worked_out_again_sees_the_same_dropout(batch: PreferenceBatch, perturb: Callable[..., None]) -> None:
    lean, published = both(perturb, "llama", lora=LoRA(rank=2, dropout=0.5))
    ours, theirs = read(lean, batch, mixed=False), read(published, batch, mixed=False)
    assert torch.equal(ours[0], theirs[0])
    assert_near(ours[1], theirs[1], ROUNDINGS)


def test_checkpointed_layers_have_the_same_gradients(batch: PreferenceBatch, perturb: Callable[..., None]) -> None:
    lean, published = both(perturb, "llama")
    lean.set_gradient_checkpointing(True)
    assert_near(read(lean, batch, False)[1], read(published, batch, False)[1], ROUNDINGS)


def test_a_copy_has_weights_of_its_own(batch: PreferenceBatch, perturb: Callable[..., None]) -> None:
    policy, _ = both(perturb, "llama")
    twin = copy.deepcopy(policy)
    before = read(twin, batch, False)[0]
    perturb(policy, seed=7)
    assert torch.equal(read(twin, batch, False)[0], before)
    assert not torch.equal(read(policy, batch, False)[0], before)


def test_a_compiler_gets_the_published_layers() -> None:
    policy = TinyPolicy(lora=LoRA(rank=2)).build()
    policy.compile_layers("eager")
    with published_layers():
        published = TinyPolicy(lora=LoRA(rank=2)).build()
    assert kinds(policy) == kinds(published)
    parts = [part for layer in policy.layers for part in layer.modules()]
    assert not any(part._forward_pre_hooks or part._forward_pre_hooks_with_kwargs for part in parts)
