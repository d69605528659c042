"""Tests of adapters: merged weights against the adapted model of peft, also where layers share a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Zamba2Config

from lpc_lightning.errors import ConfigError, UnsupportedPolicyError
from lpc_lightning.policy import LoRA, TinyPolicy
from lpc_lightning.policy.lora import merge

TOKENS = torch.arange(3, 14)[None]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
@torch.no_grad()
def test_merge_keeps_logits_of_tied_weights(
    target: str, tied: bool, tmp_path: Path, perturb: Callable[..., None]
) -> None:
    model = TinyPolicy(width=16, dtype="float64", options={"tie_word_embeddings": tied}).build().causal_lm
    plain = model(input_ids=TOKENS).logits
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"))
    perturb(torch.nn.ParameterList(p for p in adapted.parameters() if p.requires_grad), deviation=1.0)
    expected = adapted(input_ids=TOKENS).logits
    assert (expected - plain).abs().max() > 0.01
    merged = merge(adapted)
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, expected)
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(stock(input_ids=TOKENS).logits, expected)
    assert stock.config.tie_word_embeddings == (tied and target == "q_proj")


@torch.no_grad()
def test_merge_of_shared_layers(tmp_path: Path, perturb: Callable[..., None]) -> None:
    """Zamba2 has the weights of one block in several layers, and adapters of each layer."""
    config = Zamba2Config(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "adapter_rank": 2},
        **{"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_mem_blocks": 1},
        **{"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 2, "tie_word_embeddings": True},
    )
    model = AutoModelForCausalLM.from_config(config).double()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    perturb(torch.nn.ParameterList(p for p in adapted.parameters() if p.requires_grad), deviation=1.0)
    expected = adapted(input_ids=TOKENS).logits
    merged = merge(adapted)
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, expected)
    merged.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(stock(input_ids=TOKENS).logits, expected)


def test_adapter_on_lm_head_is_refused() -> None:
    with pytest.raises(UnsupportedPolicyError, match=r"found an adapter on the LM head .* Leave lm_head out of"):
        TinyPolicy(width=16, lora=LoRA(rank=2, target_modules=["q_proj", "lm_head"])).build()


@pytest.mark.parametrize(
    ("setting", "value"), [("rank", 0), ("alpha", 0), ("alpha", math.nan), ("dropout", 1.0), ("dropout", math.nan)]
)
def test_numbers_out_of_range_are_refused(setting: str, value: float) -> None:
    settings: dict[str, Any] = {setting: value}
    with pytest.raises(ConfigError, match=rf"^policy\.lora\.{setting}: found {value}, expected "):
        LoRA(**settings)
