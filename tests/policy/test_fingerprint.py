"""Tests of fingerprints: what changes them, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lpc_lightning.policy import CausalPolicy, LoRA, PretrainedPolicy, TinyPolicy, policy_fingerprint


def tiny(**settings: Any) -> CausalPolicy:
    return TinyPolicy(**({"width": 16, "layers": 1, "heads": 2} | settings)).build()


def test_fingerprint_equal_for_equal_policies(tmp_path: Path) -> None:
    policy = tiny()
    policy.causal_lm.save_pretrained(tmp_path / "model")
    TinyPolicy().load_tokenizer().save_pretrained(tmp_path / "model")
    names = {
        policy_fingerprint(policy),
        policy_fingerprint(tiny()),
        policy_fingerprint(PretrainedPolicy(str(tmp_path / "model")).build()),
    }
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
def test_fingerprint_differs_for_other_policies(change: dict[str, Any]) -> None:
    assert policy_fingerprint(tiny(**change)) != policy_fingerprint(tiny())


def test_fingerprint_depends_on_every_bit() -> None:
    policy = tiny()
    before = policy_fingerprint(policy)
    for parameter in policy.parameters():
        bits = parameter.data.view(torch.int32).flatten()
        bits[-1] ^= 1
        assert policy_fingerprint(policy) != before
        bits[-1] ^= 1
    assert policy_fingerprint(policy) == before


def test_fingerprint_excludes_adapter() -> None:
    adapted = tiny(lora=LoRA(rank=2))
    assert policy_fingerprint(adapted) == policy_fingerprint(tiny())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            parameter += "lora_" in name
    assert policy_fingerprint(adapted) == policy_fingerprint(tiny())
    assert policy_fingerprint(tiny(lora=LoRA(rank=2), seed=1)) != policy_fingerprint(tiny())


def test_adapter_counts_once_it_changes_outputs() -> None:
    plain = tiny()
    adapted, other = (tiny(lora=LoRA(rank=2)) for _ in range(2))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter += 0.1 * ("lora_A" in name)  # other first factors, as another seed draws them
    ids = torch.arange(8)[None]

    def logits(policy: CausalPolicy) -> torch.Tensor:
        return policy.causal_lm(ids).logits

    assert torch.equal(logits(adapted), logits(plain))
    assert torch.equal(logits(other), logits(plain))
    before = policy_fingerprint(plain)
    assert {policy_fingerprint(each, adapter=True) for each in (adapted, other)} == {before}
    with torch.no_grad():
        next(each for name, each in adapted.named_parameters() if "lora_B" in name)[0, 0] = 1e-3
    assert not torch.equal(logits(adapted), logits(plain))
    assert policy_fingerprint(adapted, adapter=True) != before


@pytest.mark.parametrize("setting", [{"attention": "eager"}, {"gradient_checkpointing": True}], ids=str)
def test_fingerprint_ignores_kernel(setting: dict[str, Any]) -> None:
    assert policy_fingerprint(tiny(**setting)) == policy_fingerprint(tiny())
