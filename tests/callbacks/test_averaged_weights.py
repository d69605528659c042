"""Tests of what callbacks compute at the end of a validation of averaged weights, in both orders of the callbacks.

At the end of a fit, `WeightAveraging` leaves the average in the module: the weights of the last validation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import CodeExplanations, LabelFlipNoise, PreferenceAccuracy
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.latent import LatentSpace, MarginalSpace
from lpc_lightning.policy import TinyPolicy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.parametrize("first", [True, False], ids=["average first", "average second"]),
]
Fit = Callable[..., DPO]


@pytest.fixture
def fit(first: bool, make_trainer: Any, tmp_path: Path, cache_dir: Path) -> Fit:
    """Function that runs a fit of 3 steps with a callback before or after that of the average."""

    def run(callback: Callback, *others: Callback, latent: LatentSpace | None = None) -> DPO:
        sizes = {"train_pairs": 12, "validation_pairs": 6, "batch_size": 4}
        module = DPO(
            policy=TinyPolicy(width=16, layers=1, heads=2),
            latent=latent,
            latent_lr=0.1,
            optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2),
        )
        average = EMAWeightAveraging(decay=0.9)
        ordered = [average, callback] if first else [callback, average]
        trainer = make_trainer(callbacks=[*others, *ordered], max_epochs=1, default_root_dir=tmp_path)
        trainer.fit(module, SyntheticPreferences(**sizes, cache_dir=str(cache_dir)))
        return module

    return run


def test_codes_of_averaged_weights(fit: Fit, tmp_path: Path) -> None:
    """The shift of a token is its row of the head times the code minus the mean code."""
    module = fit(CodeExplanations(tokens=5), latent=MarginalSpace(num_codes=4, init_logit_std=1.0))
    assert module.latent is not None
    head = module.policy.causal_lm.get_output_embeddings().weight.detach().double()
    codes = module.latent.codes.detach().double()
    explained = json.loads((tmp_path / "codes.json").read_text())["codes"]
    for number, code in enumerate(explained):
        shifts = [(each["token"], each["shift"]) for each in (*code["raised"], *code["lowered"])]
        assert len(shifts) == 10
        for token, shift in shifts:
            assert shift == pytest.approx(float(head[token] @ (codes[number] - codes.mean(0))), abs=1e-5)


def test_training_pairs_of_averaged_weights(fit: Fit, naive_logps: Any) -> None:
    accuracy = PreferenceAccuracy()
    module = fit(accuracy, LabelFlipNoise(0.4, seed=2))
    pairs = module.trainer.datamodule.training_pairs[:]  # type: ignore[attr-defined]
    with torch.no_grad():
        logps = naive_logps(module.policy.causal_lm, pairs).view(2, -1)
    ratios = logps - torch.tensor([pair.reference_logps for pair in pairs]).T
    margins = dict(zip([pair.id for pair in pairs], (module.beta * (ratios[0] - ratios[1])).tolist(), strict=True))
    items = accuracy.training_report.items
    assert sorted(item["id"] for item in items) == sorted(margins)
    for item in items:
        assert item["margins"]["prior"] == pytest.approx(margins[item["id"]], abs=1e-4)
