"""Tests of weights that are cast before a layer runs, against the casts of autocast in published layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer

from lpc_lightning.policy import LoRA, TinyPolicy
from lpc_lightning.policy.cast_weights import cast_weights

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture(params=["llama", "gpt2"])
def layer(request: pytest.FixtureRequest, perturb: Callable[..., None]) -> nn.Module:
    kinds: dict[str, tuple[type[PreTrainedConfig], type[nn.Module]]] = {
        "llama": (LlamaConfig, LlamaDecoderLayer),
        "gpt2": (GPT2Config, GPT2Block),
    }
    make_config, kind = kinds[request.param]
    config = make_config(**SIZES)
    config._attn_implementation = "sdpa"
    made = kind(config, layer_idx=0).eval()
    perturb(made)
    return made


def gradients(layer: nn.Module, cast: bool, recompute: bool = False, passes: int = 1) -> list[Tensor | None]:
    """Return the outputs under autocast, and the sum of the gradients of some passes."""
    generator = torch.Generator().manual_seed(3)
    angles = torch.randn(2, 1, 5, 8, generator=generator)

    def run(states: Tensor) -> Tensor:
        options = {"position_embeddings": (angles[0], angles[1])} if not isinstance(layer, GPT2Block) else {}
        if not cast:
            return layer(states, **options)
        with cast_weights(layer, "cpu"):
            return layer(states, **options)

    layer.zero_grad(set_to_none=True)
    outputs: list[Tensor | None] = []
    for _ in range(passes):
        states = torch.randn(1, 5, 16, generator=generator).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(run, states, use_reentrant=False) if recompute else run(states)
        out.square().sum().backward()
        outputs += [out.detach(), states.grad]
    return outputs + [weight.grad for weight in layer.parameters()]


def assert_equal(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for mine, other in zip(found, expected, strict=True):
        if mine is None or other is None:
            assert mine is other
        else:
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)


@pytest.mark.parametrize("recompute", [False, True])
def test_cast_weights_equal_autocast(layer: nn.Module, recompute: bool) -> None:
    """Compare two passes, whose gradients are added in float32."""
    assert_equal(gradients(layer, True, recompute, passes=2), gradients(layer, False, recompute, passes=2))


def test_cast_weights_after_update(layer: nn.Module) -> None:
    before = gradients(layer, True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(1.5)
    after = gradients(layer, True)
    assert not torch.equal(after[0], before[0])  # type: ignore[arg-type]
    assert_equal(after, gradients(layer, False))


def test_cast_weights_with_frozen_ones(layer: nn.Module) -> None:
    for number, weight in enumerate(layer.parameters()):
        weight.requires_grad_(number % 3 == 0)
    assert_equal(gradients(layer, True), gradients(layer, False))


def test_cast_weights_of_adapter(perturb: Callable[..., None]) -> None:
    """Compare the values within the layer: autocast would find nothing left to cast."""
    policy = TinyPolicy(width=16, layers=1, heads=2, lora=LoRA(rank=2)).build()
    perturb(policy)
    layer = policy.layers[0]
    before = dict(layer.named_parameters())
    with torch.autocast("cpu", torch.bfloat16), cast_weights(layer, "cpu"):
        cast = {name: module.weight for name, module in layer.named_modules() if type(module) is nn.Linear}
        assert len(cast) == 7 * 3  # the weight and two factors of each of seven projections
        for name, value in cast.items():
            weight = before[f"{name}.weight"]
            assert torch.equal(value, weight.bfloat16())
            assert value.requires_grad == weight.requires_grad
    assert all(value is before[name] for name, value in layer.named_parameters())


def test_cast_weights_of_experts() -> None:
    """Compare the kernel for stacked weights with autocast's casts in the family's own loop over experts."""
    sizes = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**SIZES, **sizes, head_dim=8, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    layer = Qwen3MoeDecoderLayer(config, layer_idx=0).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():  # the layer alone leaves its experts without values
        nn.init.normal_(weight, std=0.3, generator=generator)
    experts = layer.mlp.experts
    before = dict(experts.named_parameters())
    with torch.autocast("cpu", torch.bfloat16), cast_weights(layer, "cpu"):
        assert {name: getattr(experts, name).dtype for name in before} == dict.fromkeys(before, torch.bfloat16)
    assert dict(experts.named_parameters()).items() == before.items()
    config._experts_implementation = "grouped_mm"
    found = gradients(layer, True)
    config._experts_implementation = "eager"
    for mine, other in zip(found, gradients(layer, False), strict=True):
        torch.testing.assert_close(mine, other, rtol=0.02, atol=0.02)


def test_cast_weights_restored_after_error(layer: nn.Module) -> None:
    before = dict(layer.named_parameters())
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16), cast_weights(layer, "cpu"):
        raise ZeroDivisionError
    assert dict(layer.named_parameters()).items() == before.items()


@pytest.mark.parametrize("mixed", [False, True])
def test_cast_weights_without_need(layer: nn.Module, mixed: bool) -> None:
    """Weights stay as they are without autocast, and in autocast's own type."""
    layer = layer.bfloat16() if mixed else layer
    before = dict(layer.named_parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), cast_weights(layer, "cpu"):
        assert all(value is before[name] for name, value in layer.named_parameters())


def test_cast_weights_keeps_sharded_ones() -> None:
    """FSDP2 frees whole weights after a layer. Casts of them would stay in memory."""
    config = LlamaConfig(**SIZES)
    layer = LlamaDecoderLayer(config, layer_idx=0)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        before = dict(layer.named_parameters())
        with torch.autocast("cpu", torch.bfloat16), cast_weights(layer, "cpu"):
            assert all(value is before[name] for name, value in layer.named_parameters())
    finally:
        torch.distributed.destroy_process_group()
