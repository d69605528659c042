"""What changes the name of a policy, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpc_lightning.policy import CausalPolicy, LoRA, PretrainedPolicy, TinyPolicy, fingerprint


def tiny(**settings: Any) -> CausalPolicy:
    return TinyPolicy(**({"width": 16, "layers": 1, "heads": 2} | settings)).build()


def test_equal_policies_have_one_name_wherever_they_come_from(tmp_path: Path) -> None:
    policy = tiny()
    policy.causal_lm.save_pretrained(tmp_path / "model")
    TinyPolicy().load_tokenizer().save_pretrained(tmp_path / "model")
    names = {fingerprint(policy), fingerprint(tiny()), fingerprint(PretrainedPolicy(str(tmp_path / "model")).build())}
    assert len(names) == 1
    assert len(names.pop()) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"dtype": "bfloat16"},
        {"dtype": "float64"},
        {"family": "mistral"},
        {"layers": 2},
        {"options": {"rms_norm_eps": 1e-3}},
        {"options": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
    ],
    ids=str,
)
def test_other_weights_types_and_configs_have_other_names(change: dict[str, Any]) -> None:
    assert fingerprint(tiny(**change)) != fingerprint(tiny())


def test_one_bit_of_one_weight_counts() -> None:
    policy = tiny()
    before = fingerprint(policy)
    for parameter in policy.parameters():
        bits = parameter.data.view(torch.int32).flatten()
        bits[-1] ^= 1
        assert fingerprint(policy) != before
        bits[-1] ^= 1
    assert fingerprint(policy) == before


def test_an_adapter_does_not_count_and_its_base_does() -> None:
    adapted = tiny(lora=LoRA(rank=2))
    assert fingerprint(adapted) == fingerprint(tiny())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter += "lora_" in name
    assert fingerprint(adapted) == fingerprint(tiny())
    assert fingerprint(tiny(lora=LoRA(rank=2), seed=1)) != fingerprint(tiny())


@pytest.mark.parametrize("setting", [{"attention": "eager"}, {"gradient_checkpointing": True}], ids=str)
def test_how_it_is_computed_is_not_what_it_is(setting: dict[str, Any]) -> None:
    assert fingerprint(tiny(**setting)) == fingerprint(tiny())
