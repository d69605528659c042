"""Tests of matched accuracy and purity, against closed forms and all possible matches."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from lpc_lightning.evaluation.codebook.mutual_information import shuffled_mean
from lpc_lightning.evaluation.codebook.recovery import STATISTICS, matched_accuracy, purity


def best_match(codes: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Compute the best accuracy over all one-to-one matches, including unused codes."""
    names = list(range(max(codes.max(), labels.max()) + 1))
    accuracies = [np.mean([partner[label] == code for code, label in zip(codes, labels, strict=True)])
             for partner in permutations(names)]  # fmt: skip
    return float(max(accuracies))


def by_majority(codes: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Compute the share of items whose label is the most frequent one of their code."""
    members = [
        [label for label, item_code in zip(labels, codes, strict=True) if item_code == code] for code in set(codes)
    ]
    return sum(Counter(code_labels).most_common(1)[0][1] for code_labels in members) / len(codes)


@pytest.mark.parametrize(("codes", "labels"), [(3, 3), (6, 4), (3, 6), (1, 4), (5, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_matched_accuracy_tries_every_match(codes: int, labels: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, other = draw.integers(0, codes, 60), draw.integers(0, labels, 60)
    assert matched_accuracy(one, other) == pytest.approx(best_match(one, other), abs=1e-12)
    assert purity(one, other) == pytest.approx(by_majority(one, other), abs=1e-12)
    assert matched_accuracy(one, other) == pytest.approx(matched_accuracy(other, one), abs=1e-12)
    assert matched_accuracy(one, other) <= purity(one, other)


def test_recovery_closed_forms() -> None:
    labels = ["a"] * 4 + ["b"] * 4
    assert [matched_accuracy([2] * 4 + [7] * 4, labels), purity([2] * 4 + [7] * 4, labels)] == [1, 1]
    # Two codes per label: only one of the two can be matched, but both have a single label.
    assert [matched_accuracy([0, 0, 1, 1, 2, 2, 3, 3], labels), purity([0, 0, 1, 1, 2, 2, 3, 3], labels)] == [0.5, 1]
    # Greedy matching gives label a to code 0, and no correct items to code 1. The other match is better.
    codes = [0] * 6 + [0] * 5 + [1] * 5
    matched = matched_accuracy(codes, ["a"] * 6 + ["b"] * 5 + ["a"] * 5)
    assert matched == 10 / 16
    assert [matched_accuracy([0] * 8, labels), purity([0] * 8, labels)] == [0.5, 0.5]


@pytest.mark.parametrize("statistic", STATISTICS.values())
def test_statistics_ignore_names(statistic: object) -> None:
    draw = np.random.default_rng(3)
    codes, labels = draw.integers(0, 5, 80), draw.integers(0, 3, 80)
    renamed = np.array(["terse", "kind", "formal"])[labels]
    assert callable(statistic)
    assert statistic(codes, labels) == statistic(np.array([4, 0, 3, 1, 2])[codes], renamed)


def test_shuffled_mean_equals_chance() -> None:
    labels = np.repeat([0, 1, 2, 3], 500)
    arguments = (labels, labels, np.arange(2000), 0)
    assert shuffled_mean(matched_accuracy, *arguments) == pytest.approx(0.25, abs=0.03)
    assert shuffled_mean(purity, *arguments) == shuffled_mean(purity, *arguments)
