"""Tests that a policy which is converted to 16 bits has the buffers and results of one that is built in 16 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from transformers import AutoModelForCausalLM

from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.policy import CausalPolicy, TinyPolicy
from lpc_lightning.policy.exact_buffers import exact_buffers
from lpc_lightning.reference.live import FrozenModel
from lpc_lightning.types import TokenizedPair
from tests.policy.test_every_family import small_config

Precision = Literal["bf16-true", "16-true"]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", "bfloat16"), ("16-true", "float16")])
@torch.no_grad()
def test_converted_policy_equals_built_one(
    precision: Precision, dtype: Any, make_pairs: Callable[..., list[TokenizedPair]]
) -> None:
    """The policy and a frozen reference: Lightning converts the module that holds both."""
    batch = PaddedLayout(0)(make_pairs([(300, 40, 50)]))
    policy, built = TinyPolicy().build(), TinyPolicy(dtype=dtype).build()
    both = torch.nn.ModuleList([policy, FrozenModel(copy.deepcopy(policy))])
    HalfPrecision(precision).convert_module(both)
    for converted in (policy, both[1].policy):
        assert converted.causal_lm.dtype == getattr(torch, dtype)
        assert converted.backbone.rotary_emb.inv_freq.dtype == torch.float32
        for name, value in built.named_buffers():
            assert torch.equal(converted.get_buffer(name), value), name
        assert torch.equal(converted(batch).logps(), built(batch).logps())


def test_wider_types_and_devices_reach_all_buffers(tiny: Callable[..., CausalPolicy]) -> None:
    policy = tiny("llama", dtype="bfloat16")
    assert {buffer.dtype for buffer in policy.double().buffers()} == {torch.float64}
    assert {buffer.device.type for buffer in policy.to("meta", torch.bfloat16).buffers()} == {"meta"}
    assert {buffer.device.type for buffer in policy.to_empty(device="cpu").buffers()} == {"cpu"}


def types(model: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: buffer.dtype for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(
    "family", ["codegen", "ctrl", "falcon_h1", "gemma3n_text", "gemma4_text", "gpt2", "gptj", "phi3", "qwen3", "xglm"]
)
def test_families_convert_what_has_the_type_of_weights(family: str) -> None:
    with torch.device("meta"):
        model, built = (
            AutoModelForCausalLM.from_config(small_config(family), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
    with exact_buffers(model):
        model.to(torch.bfloat16)
    assert types(model) == types(built)


def test_biases_of_experts_stay_as_they_are_loaded(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(small_config("deepseek_v3")).save_pretrained(tmp_path)
    model, built = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    with exact_buffers(model):
        model.to(torch.bfloat16)
    assert types(model) == types(built)
    assert torch.float32 in {kind for name, kind in types(model).items() if name.endswith("e_score_correction_bias")}
