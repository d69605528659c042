"""Tests of QLoRA: 4-bit weights with an adapter, on bitsandbytes' CPU kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lpc_lightning.data.batching.layouts import SharedPrefixLayout
from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.policy import LoRA, PretrainedPolicy, TinyPolicy, policy_fingerprint
from lpc_lightning.types import TokenizedPair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved policy whose size is a multiple of the 4-bit blocks of 64."""
    folder = tmp_path_factory.mktemp("saved")
    spec = TinyPolicy(width=128, layers=2, heads=4)
    copy.deepcopy(spec.build().causal_lm).save_pretrained(folder)
    spec.load_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs([(5, 3, 7), (11, 9, 1)])


def test_quantization_without_adapter_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.quantization: found nf4 without an adapter, expected"):
        PretrainedPolicy(folder, quantization="nf4")


def test_quantization_of_gguf_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"policy\.quantization: found nf4 for model\.Q4_1\.gguf"):
        PretrainedPolicy("model.Q4_1.gguf", quantization="nf4", lora=LoRA())


def test_missing_bitsandbytes_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lpc_lightning.policy.pretrained.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, .* `pip install .* '\.\[qlora\]'`"):
        PretrainedPolicy(folder, quantization="nf4", lora=LoRA()).build()


@pytest.fixture(scope="module")
def bitsandbytes() -> Iterator[Any]:
    """The bitsandbytes module, without its inference kernels, which round more."""
    found = pytest.importorskip("bitsandbytes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield found


@pytest.fixture(scope="module")
def quantized(folder: str, bitsandbytes: Any) -> Any:
    """A quantized policy with an adapter."""
    torch.manual_seed(0)
    return PretrainedPolicy(folder, quantization="nf4", lora=LoRA(rank=4, alpha=8)).build()


def test_only_linear_layers_are_in_4_bits(quantized: Any, bitsandbytes: Any) -> None:
    layers = [module for module in quantized.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    assert all(layer.weight.dtype == torch.uint8 and layer.weight.quant_type == "nf4" for layer in layers)
    assert quantized.head.weight.dtype == torch.float32
    trained = [name for name, parameter in quantized.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(layers)
    assert all("lora_" in name for name in trained)


def test_logps_equal_those_of_dequantized_weights(
    quantized: Any, folder: str, bitsandbytes: Any, pairs: list[TokenizedPair]
) -> None:
    plain = PretrainedPolicy(folder).build()
    named = dict(plain.causal_lm.named_modules())
    with torch.no_grad():
        for name, module in quantized.causal_lm.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                named[name.removesuffix(".base_layer")].weight.copy_(weight)
        batch = SharedPrefixLayout(0, 64)(pairs)
        torch.testing.assert_close(quantized(batch).logps(), plain(batch).logps(), rtol=1e-4, atol=1e-3)


def test_adapter_of_quantized_policy_learns(quantized: Any, pairs: list[TokenizedPair]) -> None:
    """Train by the model's loss, since `CausalPolicy` refuses to train on a CPU."""
    trained = [parameter for parameter in quantized.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids, losses = torch.tensor([pairs[1].prompt_ids + pairs[1].chosen_ids]), []
    for _ in range(5):
        loss = quantized.model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_quantized_training_on_cpu_is_refused(quantized: Any, pairs: list[TokenizedPair]) -> None:
    with pytest.raises(UnsupportedPolicyError, match=r"policy\.quantization: found weights in 4 bits on a CPU"):
        quantized(SharedPrefixLayout(0, 64)(pairs))


def test_adapter_loads_onto_unquantized_weights(quantized: Any, folder: str, pairs: list[TokenizedPair]) -> None:
    """Load the checkpoint of a quantized policy with `quantization: null`."""
    whole = PretrainedPolicy(folder, lora=LoRA(rank=4, alpha=8)).build()
    adapter = {name: value for name, value in quantized.state_dict().items() if "lora_" in name}
    missing, unexpected = whole.load_state_dict(adapter, strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora_" in name]
    batch = SharedPrefixLayout(0, 64)(pairs)
    with torch.no_grad():
        found, coarse = whole(batch).logps(), quantized(batch).logps()
        merged = whole.model.merge_and_unload()
    assert (found - coarse).abs().max() < 0.1 * coarse.abs().max()
    assert type(merged).__name__ == "LlamaForCausalLM"


def test_fingerprint_reads_the_scales(folder: str, bitsandbytes: Any) -> None:
    """Equal codes with other scales are other weights."""

    def build() -> Any:
        return PretrainedPolicy(folder, quantization="nf4", lora=LoRA(rank=2)).build()

    policy, other = build(), build()
    assert policy_fingerprint(policy) == policy_fingerprint(other)
    layer = other.causal_lm.model.layers[1].mlp.down_proj.base_layer
    state = layer.weight.quant_state
    fingerprints = {policy_fingerprint(other)}
    for scales in (state.absmax, state.state2.absmax, state.offset):
        codes, before = layer.weight.data.clone(), bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
        scales.view(-1)[:1] += 1
        assert torch.equal(layer.weight.data, codes)
        assert not torch.equal(bitsandbytes.functional.dequantize_4bit(layer.weight.data, state), before)
        fingerprints.add(policy_fingerprint(other))
    assert len(fingerprints) == 4
