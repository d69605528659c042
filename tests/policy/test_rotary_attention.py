"""Tests of attention with one product for queries, keys and values, against published layers of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from lpc_lightning.policy.memory_efficient_layers import make_memory_efficient
from lpc_lightning.policy.rotary_attention import RotaryAttention, _RotatedProducts

FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[nn.Module], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaAttention, {}),
    "llama with biases": (LlamaConfig, LlamaAttention, {"attention_bias": True}),
    "llama without groups": (LlamaConfig, LlamaAttention, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, MistralAttention, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2Attention, {}),
}
TYPES = {"float32": (torch.float32, False), "bf16-true": (torch.bfloat16, False), "bf16-mixed": (torch.float32, True)}
every_type = pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)


@pytest.fixture
def make_pair(perturb: Callable[..., None]) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """Return a function that makes a published layer and its replacement, with equal weights."""

    def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, nn.Module]:
        make_config, kind, more = FAMILIES[family]
        sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = make_config(**(sizes | {"num_hidden_layers": 1} | more | options))
        config._attn_implementation = "sdpa"
        published = kind(config, layer_idx=0)
        perturb(published)
        published.to(dtype)
        replaced = copy.deepcopy(published)
        make_memory_efficient([nn.Sequential(replaced)])
        return published, replaced

    return make


def angles(rows: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw cosines and sines that differ between the halves of a head, as no family's do."""
    drawn = 6.3 * torch.rand(rows, tokens, width, generator=torch.Generator().manual_seed(2))
    return drawn.cos().to(dtype), drawn.sin().to(dtype)


def outcome(layer: nn.Module, mixed: bool, tokens: int = 7) -> tuple[Tensor, list[Tensor]]:
    """Return outputs of two rows, and the gradients of states and trained weights."""
    dtype = next(layer.parameters()).dtype
    states = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    mask = torch.ones(tokens, tokens).tril().log().to(torch.bfloat16 if mixed else dtype)[None, None]
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = layer(states, position_embeddings=angles(2, tokens, layer.head_dim, dtype), attention_mask=mask)[0]
    leaves = [states, *(weight for weight in layer.parameters() if weight.requires_grad)]
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    return out, list(torch.autograd.grad((weights * out).sum(), leaves))


@every_type
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_attention_equals_published(
    family: str, kind: tuple[torch.dtype, bool], make_pair: Callable[..., tuple[nn.Module, nn.Module]]
) -> None:
    published, replaced = make_pair(family, kind[0])
    assert type(replaced) is RotaryAttention
    (expected, exact), (found, gradients) = outcome(published, kind[1]), outcome(replaced, kind[1])
    assert torch.equal(found, expected)
    share = 2e-2 if torch.bfloat16 in (kind[0], found.dtype) else 1e-5
    for mine, other in zip(gradients, exact, strict=True):
        assert mine.dtype == other.dtype
        assert mine.is_contiguous() == other.is_contiguous()
        assert (mine - other).norm() <= share * other.norm()


def test_rotary_attention_is_as_exact(make_pair: Callable[..., tuple[nn.Module, nn.Module]]) -> None:
    """Compare the gradients of both layers in mixed precision with those in float64."""
    published, replaced = make_pair("llama")
    exact = outcome(copy.deepcopy(published).double(), False, tokens=40)[1]

    def error(layer: nn.Module) -> float:
        pairs = zip(outcome(layer, True, tokens=40)[1], exact, strict=True)
        return sum(float((mine - other).square().sum()) for mine, other in pairs) ** 0.5

    assert 0 < error(replaced) < 1.1 * error(published)


def test_rotated_products_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5), (8, 5), (4, 5), (4, 5), (8,), (4,), (4,)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    cos, sin = angles(2, 3, 4, torch.float64)
    apply = _RotatedProducts.apply
    assert torch.autograd.gradcheck(lambda states, *rest: apply(states, cos, sin, *rest), leaves)
    without = [*leaves[:4], None, None, None]
    assert torch.autograd.gradcheck(lambda states, *rest: apply(states, cos, sin, *rest), without)


@every_type
def test_rotary_attention_with_frozen_weights(
    kind: tuple[torch.dtype, bool], make_pair: Callable[..., tuple[nn.Module, nn.Module]]
) -> None:
    layers = make_pair("llama with biases", kind[0])
    for layer in layers:
        for name, weight in layer.named_parameters():
            weight.requires_grad_(name in ("k_proj.weight", "v_proj.bias"))
    expected, found = (outcome(layer, kind[1]) for layer in layers)
    assert torch.equal(found[0], expected[0])
    share = 2e-2 if torch.bfloat16 in (kind[0], found[0].dtype) else 1e-5
    for mine, other in zip(found[1], expected[1], strict=True):
        assert (mine - other).norm() <= share * other.norm()


def test_rotary_attention_adds_gradients(make_pair: Callable[..., tuple[nn.Module, nn.Module]]) -> None:
    """Accumulate two passes. The gradients of the three weights share memory, and must not be mixed up."""
    _, layer = make_pair("llama")
    single = outcome(layer, False)[1][1:]
    for _ in range(2):
        states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(7, 7).tril().log()[None, None]
        out = layer(states, position_embeddings=angles(2, 7, 8, torch.float32), attention_mask=mask)[0]
        (torch.linspace(-1, 1, out.numel()).view_as(out) * out).sum().backward()
    for weight, gradient in zip(layer.parameters(), single, strict=True):
        assert torch.equal(weight.grad, 2 * gradient)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("case", ["cache", "float64", "eager"])
def test_rotary_attention_runs_published(
    case: str, make_pair: Callable[..., tuple[nn.Module, nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float64 if case == "float64" else torch.float32
    published, replaced = make_pair("mistral", dtype, sliding_window=3)
    monkeypatch.setattr(_RotatedProducts, "apply", lambda *inputs: pytest.fail("products were fused"))
    results = []
    for layer in (published, replaced):
        if case == "eager":
            layer.config._attn_implementation = "eager"
        states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
        options = {"past_key_values": DynamicCache()} if case == "cache" else {}
        position = angles(1, 5, 8, dtype)
        results.append(layer(states, position_embeddings=position, attention_mask=None, **options)[0])
    assert torch.equal(*results)
