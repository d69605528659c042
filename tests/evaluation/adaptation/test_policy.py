"""The policy under inferred mixtures, against pairs asked one by one under their own z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs
from lpc_lightning.evaluation.adaptation.policy import PolicyUnderMixtures
from lpc_lightning.latent import MarginalSpace

ANNOTATORS = ["cleo"] + ["anna"] * 6 + ["ben"] * 5


@pytest.fixture
def module(tiny_spec: Callable[..., Any], perturb: Callable[..., None]) -> DPO:
    space = MarginalSpace(num_codes=3, init_logit_std=2.0)
    found = DPO(policy=tiny_spec(), latent=space, reference="live", beta=2.0)
    found.configure_model()
    perturb(found.policy)
    perturb(space.double())
    return found


@pytest.fixture
def batches(make_pairs: Callable[..., Any]) -> list[Any]:
    pairs = make_pairs([(2 + number % 3, 3, 4) for number in range(12)])
    pairs = [replace(pair, annotator=name) for pair, name in zip(pairs, ANNOTATORS, strict=True)]
    return [PaddedLayout(0)(pairs[:7]), PaddedLayout(0)(pairs[7:])]


@torch.no_grad()
def taken(module: DPO, batches: list[Any], collector: Any) -> Any:
    for number, batch in enumerate(batches):
        collector.update(module.validation_step(batch, number), batch, module.latent)
    return collector


@torch.no_grad()
def right(module: DPO, batches: list[Any], name: str, weights: Any) -> float:
    """One pair's own z, in the place of every pair of its batch."""
    space: Any = module.latent
    (batch,) = [batch for batch in batches if name in batch.ids]
    z = sum(float(weight) * code for weight, code in zip(weights, space.codebook.weight, strict=True))
    pairs, _ = module.read(batch)[1].under(z.expand(len(batch.ids), -1))
    place = batch.ids.index(name)
    return float(pairs.chosen_rewards[place] > pairs.rejected_rewards[place])


def test_against_pairs_asked_one_by_one(module: DPO, batches: list[Any]) -> None:
    report = taken(module, batches, AdaptationPairs(shots=(0, 1, 4), seed=3)).collect()
    scores = taken(module, batches, PolicyUnderMixtures(report.mixtures, "annotator")).scores()
    assert [(n, score.pairs) for n, score in scores.items()] == [(0, 12), (1, 11), (4, 11)]
    for n, score in scores.items():
        expected = {name: right(module, batches, name, weights) for name, weights in report.mixtures[n].items()}
        assert score.accuracy == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
        of = {f"pair {number}": name for number, name in enumerate(ANNOTATORS)}
        for annotator, mean in score.by_annotator.items():
            own = [value for name, value in expected.items() if of[name] == annotator]
            assert mean == pytest.approx(np.mean(own), abs=1e-12)


def test_given_none_it_is_the_policy_as_it_is_used(module: DPO, batches: list[Any]) -> None:
    """And not the mixture of the codes' predictions, which is another number."""
    report = taken(module, batches, AdaptationPairs(shots=(0,))).collect()
    scores = taken(module, batches, PolicyUnderMixtures(report.mixtures, "annotator")).scores()
    assert scores[0] == report.baselines["prior"]


def test_one_sure_code_is_that_code(module: DPO, batches: list[Any]) -> None:
    names = [name for batch in batches for name in batch.ids]
    mixtures = {8: dict.fromkeys(names, np.array([0.0, 1.0, 0.0]))}
    scores = taken(module, batches, PolicyUnderMixtures(mixtures, "annotator")).scores()
    space: Any = module.latent
    found = []
    for batch in batches:
        with torch.no_grad():
            pairs, _ = module.read(batch)[1].under_codes(space.codebook.weight)
        found += (pairs.chosen_rewards > pairs.rejected_rewards)[:, 1].tolist()
    assert scores[8].accuracy == pytest.approx(np.mean(found))
