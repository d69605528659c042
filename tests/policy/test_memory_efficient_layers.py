"""Tests of memory efficient layers against published ones: equal outputs, near gradients, and kept memory."""

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
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.beam.modeling_beam import BeamMLP
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from lpc_lightning.data.batching.layouts import PaddedLayout, SharedPrefixLayout
from lpc_lightning.policy import CausalPolicy, LoRA, TinyPolicy, spec
from lpc_lightning.policy.memory_efficient_layers import GatedMLP, RMSNorm
from lpc_lightning.policy.rotary_attention import RotaryAttention
from lpc_lightning.types import PreferenceBatch

WINDOW = "sliding_attention"
FAMILIES = ("llama", "mistral", "qwen2", "gpt2", "gemma2", "olmo2")


@pytest.fixture
def batch(make_pairs: Callable[..., Any]) -> PreferenceBatch:
    return SharedPrefixLayout(0, None)(make_pairs([(5, 3, 7), (11, 9, 1), (1, 1, 4)]))


@contextmanager
def published_layers() -> Iterator[None]:
    """Build policies with the published layers of transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "make_memory_efficient", lambda layers: None)
        yield


def both(perturb: Callable[..., None], *settings: Any, **more: Any) -> tuple[CausalPolicy, CausalPolicy]:
    """Build a policy with memory efficient layers, and an equal one with the published layers."""
    torch.manual_seed(0)  # for adapters
    efficient = TinyPolicy(*settings, **more).build()
    torch.manual_seed(0)
    with published_layers():
        published = TinyPolicy(*settings, **more).build()
    for policy in (efficient, published):
        perturb(policy)
    assert efficient.state_dict().keys() == published.state_dict().keys()
    return efficient, published


def kinds(policy: CausalPolicy) -> list[type]:
    return [type(part) for layer in policy.layers for part in layer.modules()]


def read(policy: CausalPolicy, batch: PreferenceBatch, mixed: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the answers' log-probabilities, and the gradients of a sum of them for all trained parameters."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
        logps = policy(batch).logps()
    weights = torch.linspace(-1, 1, len(logps), dtype=logps.dtype)
    return logps, list(torch.autograd.grad((weights * logps).sum(), trained))


ROUNDINGS = 256 * torch.finfo(torch.float32).eps
"""Bound on a gradient's error, as a share of its norm, after some hundred float32 products and sums. Their order varies
between processors. A wrong dropout mask changes a gradient by about its whole norm."""


def assert_near(found: list[Tensor], expected: list[Tensor], share: float) -> None:
    for mine, other in zip(found, expected, strict=True):
        assert (mine - other).norm() <= share * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_equal_and_gradients_near(
    family: str, dtype: Any, mixed: bool, batch: PreferenceBatch, perturb: Callable[..., None]
) -> None:
    efficient, published = both(perturb, family, dtype=dtype)
    ours, theirs = read(efficient, batch, mixed), read(published, batch, mixed)
    assert torch.equal(ours[0], theirs[0])
    # Also for float64, since norms are computed in float32.
    assert_near(ours[1], theirs[1], 0.05 if mixed or dtype == "bfloat16" else ROUNDINGS)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
    ],
)
def test_norm_of_heads_has_published_gradient(
    family: Any, options: dict[str, Any], make_pairs: Callable[..., Any], perturb: Callable[..., None]
) -> None:
    """Queries and keys are normalized by head, and then transposed, as are their gradients."""
    batch = PaddedLayout(0)(make_pairs([(5, 3, 7), (11, 9, 1)]))  # some layers of LFM2 accept no mask
    efficient, published = both(perturb, family, 16, heads=2, options=options)
    assert kinds(efficient).count(RMSNorm) > 2 * len(efficient.layers)
    ours, theirs = read(efficient, batch, mixed=False), read(published, batch, mixed=False)
    assert torch.equal(ours[0], theirs[0])
    assert_near(ours[1], theirs[1], ROUNDINGS)


def test_gradients_in_bfloat16_are_as_exact(batch: PreferenceBatch, perturb: Callable[..., None]) -> None:
    efficient, published = both(perturb, "llama", width=64)
    exact = read(published, batch, mixed=False)[1]

    def error(policy: CausalPolicy) -> float:
        found = read(policy, batch, mixed=True)[1]
        return sum(float((mine - other).square().sum()) for mine, other in zip(found, exact, strict=True)) ** 0.5

    assert 0 < error(efficient) < 1.1 * error(published)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "mlp", "norm", "attention"),
    [
        *[("llama", 1, 2, 1), ("mistral", 1, 2, 1), ("qwen2", 1, 2, 1), ("qwen3", 1, 4, 0)],
        *[("gpt2", 0, 0, 0), ("gemma2", 1, 0, 0), ("olmo2", 1, 0, 0)],
    ],
)
def test_known_parts_are_replaced(family: Any, mlp: int, norm: int, attention: int, dtype: Any) -> None:
    policy = TinyPolicy(family, dtype=dtype).build()
    found = kinds(policy)
    layers = len(policy.layers)
    assert (found.count(GatedMLP), found.count(RMSNorm)) == (mlp * layers, norm * layers)
    assert found.count(RotaryAttention) == attention * layers
    assert type(policy.backbone.norm if family != "gpt2" else policy.backbone.ln_f) not in (GatedMLP, RMSNorm)


class _Clipped(nn.Module):
    """An MLP with the children of a gated MLP and another formula."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


def test_part_with_other_outputs_is_kept() -> None:
    part = _Clipped()
    spec.make_memory_efficient([nn.Sequential(part)])
    assert type(part) is _Clipped


PARTS: dict[str, Callable[[], nn.Module]] = {
    "LlamaRMSNorm": lambda: LlamaRMSNorm(64),
    "Olmo2RMSNorm": lambda: Olmo2RMSNorm(64),
    "IdeficsRMSNorm": lambda: IdeficsRMSNorm(64),
    "LlamaMLP": lambda: LlamaMLP(TinyPolicy().load_config()),
    "BeamMLP": lambda: BeamMLP(TinyPolicy().load_config()),
}


@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_part_equals_published_in_mixed_precision(name: str, perturb: Callable[..., None]) -> None:
    """Norms and MLPs differ between families in where they round to 16 bits, and in the type of their results."""
    part = PARTS[name]()
    published = copy.deepcopy(part)
    spec.make_memory_efficient([nn.Sequential(part)])
    assert (type(part) is not type(published)) == name.startswith("Llama")
    perturb(part)
    perturb(published)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(50, 64).to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(part(x), published(x), rtol=0, atol=0)


@torch.no_grad()
def test_part_that_overflows_is_replaced() -> None:
    part = LlamaMLP(TinyPolicy().load_config()).half()
    part.gate_proj.weight *= 1000
    assert not part(torch.full((1, part.hidden_size), 1e3).half()).isfinite().all()
    spec.make_memory_efficient([nn.Sequential(part)])
    assert type(part) is GatedMLP


DEEPSEEK = {
    **{"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hash_layers": 0},
    **{"qk_rope_head_dim": 4, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 1, "layer_types": 2 * [WINDOW]},
}


@torch.no_grad()
def test_limit_of_large_states_is_kept(make_pairs: Callable[..., Any], perturb: Callable[..., None]) -> None:
    """DeepSeek-V4 limits gate and up to 10, which states of a new model do not reach."""
    batch = PaddedLayout(0)(make_pairs([(5, 3, 7), (11, 9, 1)]))
    policies = both(perturb, "deepseek_v4", 16, heads=2, attention="eager", options=DEEPSEEK)
    for policy in policies:
        for name, weight in policy.named_parameters():
            weight *= 400 if name.endswith("post_attention_layernorm.weight") else 1
    ours, theirs = (policy(batch).logps() for policy in policies)
    assert torch.equal(ours, theirs)


def kept(run: Callable[[], Tensor], tokens: int) -> int:
    """Count the bytes that `run` keeps for the backward pass, in tensors with a value for each token."""
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
    """Compute the hidden states of one row."""
    row = torch.arange(tokens)[None]
    return policy.states(row, torch.ones_like(row), torch.zeros_like(row), row)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_torch_rms_norm_keeps_second_copy(dtype: torch.dtype, size: int) -> None:
    """If this test fails, torch has improved, and its `rms_norm` can replace ours."""
    tokens, width = 37, 32
    efficient = next(part for part in TinyPolicy(width=width).build().layers[0].modules() if isinstance(part, RMSNorm))
    norm, x = efficient.to(dtype), torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    assert kept(lambda: norm(x), tokens) == tokens * (size * width + 4)
    assert kept(lambda: rms_norm(x, (width,), norm.weight, 1e-6), tokens) == tokens * (2 * 4 * width + 4)


def test_bytes_kept_by_a_layer() -> None:
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


class Operations(TorchDispatchMode):
    """Counts operations that read or write memory: neither views nor allocations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allocates = func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like)
        aliases = func.is_view or func.overloadpacket in (torch.ops.aten._unsafe_view, torch.ops.aten.detach)
        self.count += not (allocates or aliases)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "mixed", "most"),
    [("float32", False, 72), ("bfloat16", False, 82), ("float32", True, 88)],
    ids=["32-true", "bf16-true", "bf16-mixed"],
)
def test_layer_has_few_operations(dtype: Any, mixed: bool, most: int, batch: PreferenceBatch) -> None:
    """Count the operations of a layer's forward and backward pass by the kernel and mask of a GPU."""

    def operations(layers: int) -> int:
        policy = TinyPolicy(layers=layers, dtype=dtype, attention="sdpa").build()
        with Operations() as passes:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                hidden = policy.hidden(batch)
            hidden.sum().backward()
        return passes.count

    assert operations(3) - operations(2) <= most
    with published_layers():
        assert operations(3) - operations(2) > 1.3 * most


def test_recomputation_uses_same_dropout(batch: PreferenceBatch, perturb: Callable[..., None]) -> None:
    efficient, published = both(perturb, "llama", lora=LoRA(rank=2, dropout=0.5))
    ours, theirs = read(efficient, batch, mixed=False), read(published, batch, mixed=False)
    assert torch.equal(ours[0], theirs[0])
    assert_near(ours[1], theirs[1], ROUNDINGS)


def test_checkpointed_layers_have_same_gradients(batch: PreferenceBatch, perturb: Callable[..., None]) -> None:
    efficient, published = both(perturb, "llama")
    efficient.set_gradient_checkpointing(True)
    assert_near(read(efficient, batch, False)[1], read(published, batch, False)[1], ROUNDINGS)


def test_deep_copy_has_own_weights(batch: PreferenceBatch, perturb: Callable[..., None]) -> None:
    policy, _ = both(perturb, "llama")
    twin = copy.deepcopy(policy)
    before = read(twin, batch, False)[0]
    perturb(policy, seed=7)
    assert torch.equal(read(twin, batch, False)[0], before)
    assert not torch.equal(read(policy, batch, False)[0], before)


def test_compiled_layers_are_the_published_ones() -> None:
    policy = TinyPolicy(lora=LoRA(rank=2)).build()
    policy.compile_layers("eager")
    with published_layers():
        published = TinyPolicy(lora=LoRA(rank=2)).build()
    assert kinds(policy) == kinds(published)
    parts = [part for layer in policy.layers for part in layer.modules()]
    assert not any(part._forward_pre_hooks or part._forward_pre_hooks_with_kwargs for part in parts)
