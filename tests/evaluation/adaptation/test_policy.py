"""Tests of the policy under inferred mixtures, against single pairs under their own z."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.evaluation.adaptation.annotated_pairs import answer_rows
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs
from lpc_lightning.evaluation.adaptation.policy import PolicyUnderMixtures
from lpc_lightning.latent import MarginalSpace

ANNOTATORS = ["cleo"] + ["anna"] * 6 + ["ben"] * 5


@pytest.fixture
def module(tiny_spec: Callable[..., Any], perturb: Callable[..., None]) -> DPO:
    space = MarginalSpace(num_codes=3, init_logit_std=2.0)
    module = DPO(policy=tiny_spec(), latent=space, reference="live", beta=2.0)
    module.configure_model()
    perturb(module.policy)
    perturb(space.double())
    return module


@pytest.fixture
def batches(make_pairs: Callable[..., Any]) -> list[Any]:
    pairs = make_pairs([(2 + number % 3, 3, 4) for number in range(12)])
    pairs = [replace(pair, annotator=name) for pair, name in zip(pairs, ANNOTATORS, strict=True)]
    return [PaddedLayout(0)(pairs[:7]), PaddedLayout(0)(pairs[7:])]


@torch.no_grad()
def collect_batches(module: DPO, batches: list[Any], collector: Any) -> Any:
    for number, batch in enumerate(batches):
        collector.update(module.validation_step(batch, number), batch, module.latent)
    return collector


@torch.no_grad()
def is_correct(module: DPO, batches: list[Any], name: str, weights: Any) -> float:
    """Score one pair under its own z, which is used for every pair of its batch."""
    space: Any = module.latent
    (batch,) = [batch for batch in batches if name in batch.ids]
    z = sum(float(weight) * code for weight, code in zip(weights, space.codebook.weight, strict=True))
    pairs, _ = module.score_batch(batch)[1].under(z.expand(len(batch.ids), -1))
    index = batch.ids.index(name)
    return float(pairs.chosen_rewards[index] > pairs.rejected_rewards[index])


def test_policy_under_mixtures_against_single_pairs(module: DPO, batches: list[Any]) -> None:
    report = collect_batches(module, batches, AdaptationPairs(shots=(0, 1, 4), seed=3)).collect()
    scores = collect_batches(module, batches, PolicyUnderMixtures(report.mixtures, "annotator")).scores()["exact_z"]
    assert [(n, score.pairs) for n, score in scores.items()] == [(0, 12), (1, 11), (4, 11)]
    for n, score in scores.items():
        mixtures = report.mixtures["exact"][n].items()
        names = {row["content"]: row["id"] for batch in batches for row in answer_rows(batch)}
        expected = {names[key]: is_correct(module, batches, names[key], weights) for (_, key), weights in mixtures}
        assert score.accuracy == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
        owners = {f"pair {number}": name for number, name in enumerate(ANNOTATORS)}
        for annotator, mean in score.by_annotator.items():
            own = [value for name, value in expected.items() if owners[name] == annotator]
            assert mean == pytest.approx(np.mean(own), abs=1e-12)


@pytest.mark.parametrize("numbers", [[0, *range(6), *range(5)], [7] * 12])
def test_policy_under_mixtures_ids_repeat(numbers: list[int], module: DPO, batches: list[Any]) -> None:
    """Ids may start again with each annotator, or number prompts. Given all other pairs of an annotator, their order
    does not matter."""
    rest = iter(numbers)
    repeated = [replace(batch, ids=tuple(str(next(rest)) for _ in batch.ids)) for batch in batches]
    scores = []
    for given in (batches, repeated):
        report = collect_batches(module, given, AdaptationPairs(shots=(4, 5))).collect()
        assert [len(report.mixtures["exact"][n]) for n in (4, 5)] == [11, 6], "one for each pair"
        scores.append(
            collect_batches(module, given, PolicyUnderMixtures(report.mixtures, "annotator")).scores()["exact_z"]
        )
    assert [{n: score.pairs for n, score in each.items()} for each in scores] == [{4: 11, 5: 6}] * 2
    for n, annotator in ((4, "ben"), (5, "anna")):
        assert scores[0][n].by_annotator[annotator] == scores[1][n].by_annotator[annotator]


def test_policy_under_mixtures_zero_shots(module: DPO, batches: list[Any]) -> None:
    """Without labelled pairs it is the policy under its prior, not the mixture of the codes' predictions."""
    report = collect_batches(module, batches, AdaptationPairs(shots=(0,))).collect()
    scores = collect_batches(module, batches, PolicyUnderMixtures(report.mixtures, "annotator")).scores()["exact_z"]
    assert scores[0] == report.baselines["prior"]


def test_policy_under_mixtures_of_one_code(module: DPO, batches: list[Any]) -> None:
    keys = [(row["annotator"], row["content"]) for batch in batches for row in answer_rows(batch)]
    mixtures = {"exact": {8: dict.fromkeys(keys, np.array([0.0, 1.0, 0.0]))}}
    scores = collect_batches(module, batches, PolicyUnderMixtures(mixtures, "annotator")).scores()["exact_z"]
    space: Any = module.latent
    expected = []
    for batch in batches:
        with torch.no_grad():
            pairs, _ = module.score_batch(batch)[1].under_codes(space.codebook.weight)
        expected += (pairs.chosen_rewards > pairs.rejected_rewards)[:, 1].tolist()
    assert scores[8].accuracy == pytest.approx(np.mean(expected))
