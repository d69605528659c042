"""Tests that no pair is predicted from a label that its annotator gave to a copy of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs, AdaptationReport
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.types import TokenizedPair
from tests.evaluation.adaptation.test_inference import hashed

Vote = tuple[str, int, bool]
"""Id, statement and label."""
VOTES: list[Vote] = [
    *[("0", 0, True), ("0 again", 0, True)],
    *[("1", 1, True), ("1 changed", 1, False)],
    *[("2", 2, False), ("2", 2, False)],
    *[("3", 3, True), ("4", 4, False), ("5", 5, True)],
]
"""Three statements twice: with two ids, with both labels (the answers are exchanged), and with one id."""
GIVEN: list[Vote] = [("0 before", 0, True), ("1", 1, True), ("6", 6, False), ("7", 7, False), ("8", 8, True)]
"""Labels of another split, two of predicted statements."""


def pair_of(vote: Vote) -> TokenizedPair:
    name, statement, agrees = vote
    answers = ([5, 2], [7, 2]) if agrees else ([7, 2], [5, 2])
    return TokenizedPair(name, [10 + statement, 3], *answers, annotator="anna")


def report_of(module: DPO, predicted: Sequence[Vote], given: Sequence[Vote], shots: Sequence[int]) -> AdaptationReport:
    collector = AdaptationPairs(shots=shots, rounds=6)
    for part, votes in ((collector.evaluated, predicted), (collector.labelled, given)):
        if votes:
            batch = PaddedLayout(0)([pair_of(vote) for vote in votes])
            with torch.no_grad():
                part.update(module.scoring_step(batch, 0), batch, module.latent)
    return collector.collect()


@pytest.fixture
def module(tiny_spec: Callable[..., Any], perturb: Callable[..., None]) -> DPO:
    module = DPO(policy=tiny_spec(), latent=MarginalSpace(num_codes=3), reference="live")
    module.configure_model()
    perturb(module.policy)
    return module


@pytest.mark.parametrize("apart", [False, True])
def test_copies_give_no_labels(apart: bool, module: DPO) -> None:
    """The oracle is a loop over the statements. At one more label than here, some pair has too few."""
    most = 4 if apart else 7
    scores = report_of(module, VOTES, GIVEN if apart else [], (1, 2, most, most + 1)).scores
    assert set(scores) == {"exact", "own_majority"}
    assert [list(by_n) for by_n in scores.values()] == [[1, 2, most]] * 2
    for n in (1, 2, most):
        right = []
        for number in range(6):
            ring = sorted(GIVEN if apart else VOTES, key=lambda vote: hashed("adapt", 0, number, vote[0]))
            for vote in VOTES:
                start = 0 if apart else ring.index(vote) + 1
                others = [other for other in ring[start:] + ring[:start] if other[1] != vote[1]]
                counts = Counter(agrees for _, _, agrees in others[:n])
                right.append((np.sign(counts[vote[2]] - counts[not vote[2]]) + 1) / 2)
        assert scores["own_majority"][n].accuracy == pytest.approx(np.mean(right), abs=1e-12)


def test_counts_of_labels_without_copies(module: DPO) -> None:
    """Two pairs and a copy: each has one other pair."""
    report = report_of(module, VOTES[2:5], [], (0, 1, 2))
    assert report.available == {"anna": 1}
    assert [report.too_few(n) for n in (0, 1, 2)] == [[], [], [3]]
    assert report_of(module, VOTES, GIVEN, (0,)).available == {"anna": 4}
