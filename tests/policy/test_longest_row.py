"""Tests that pairs are refused whose log-probabilities would depend on the other rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.evaluation.accuracy.preferences import preference_accuracy
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.policy.checks import check_longest

ROPES: dict[str, dict[str, Any]] = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
}


def tiny(rope: str) -> TinyPolicy:
    context = 32 if rope == "dynamic" else 128
    return TinyPolicy(width=32, heads=2, context=context, options={"rope_parameters": ROPES[rope]})


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_pairs_within_the_context_do_not_change(rope: str, make_pairs: Any, perturb: Callable[..., None]) -> None:
    """A pair beside one of 32 tokens, which is allowed, and beside one of 60, which is refused."""
    policy = tiny(rope).build()
    perturb(policy, deviation=0.5)
    short, allowed, refused = make_pairs([(5, 9, 7), (20, 12, 3), (20, 40, 3)])
    alone = policy(PaddedLayout(0)([short])).logps()
    beside = {
        name: policy(PaddedLayout(0)([short, other])).logps()[[0, 2]]
        for name, other in (("a", allowed), ("r", refused))
    }
    torch.testing.assert_close(beside["a"], alone)
    assert (beside["r"] - alone).abs().max() > 0.01
    check_longest(policy.backbone.config, 32)
    for longest in (33, None):
        with pytest.raises(UnsupportedPolicyError, match=f"data.max_length: found .*, expected at most 32 .* {rope}"):
            check_longest(policy.backbone.config, longest)


def test_other_ropes_have_no_limit() -> None:
    check_longest(TinyPolicy(width=32, heads=2).load_config(), None)


REFUSAL = r"data\.max_length: found 1024, expected at most 32 .*\(evaluate, adapt and explain: --max_length\)"


def test_fit_refuses_pairs_beyond_the_context(fit_run: Any, small_data: Any) -> None:
    with pytest.raises(UnsupportedPolicyError, match=REFUSAL):
        fit_run(DPO(policy=tiny("longrope")), small_data(), max_steps=1)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A plain model."""
    policy = tiny("longrope")
    policy.build().causal_lm.save_pretrained(tmp_path / "longrope")
    policy.load_tokenizer().save_pretrained(tmp_path / "longrope")
    return str(tmp_path / "longrope")


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_fit_refuses_them_for_the_reference(reference: Any, folder: str, fit_run: Any, small_data: Any) -> None:
    module = DPO(policy=TinyPolicy(width=32, heads=2), reference=reference, reference_path=folder)
    with pytest.raises(UnsupportedPolicyError, match=REFUSAL):
        fit_run(module, small_data(), max_steps=1)


def test_evaluation_refuses_them(folder: str, small_data: Any) -> None:
    """A plain model, and a module, as in `adapt`."""
    module = DPO(policy=tiny("longrope"))
    module.configure_model()
    for model in (folder, module):
        with pytest.raises(UnsupportedPolicyError, match=REFUSAL):
            preference_accuracy(model, small_data(), "validation", progress_bar=False)
