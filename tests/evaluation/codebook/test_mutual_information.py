"""Tests of mutual information, against closed forms, loops and scikit-learn."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import ArrayLike
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from lpc_lightning.evaluation.codebook.mutual_information import (
    contingency,
    entropy,
    mutual_information,
    normalized_information,
    quantile_bins,
    shuffled_information,
    shuffled_mean,
)
from lpc_lightning.evaluation.codebook.recovery import purity


def labels_from_counts(counts: list[list[int]]) -> tuple[list[int], list[str]]:
    """Make paired labels with the counts of a contingency table."""
    cells = [
        (row, "abcdef"[column]) for row, line in enumerate(counts) for column, n in enumerate(line) for _ in range(n)
    ]
    return [row for row, _ in cells], [column for _, column in cells]


def channel(flip: float) -> float:
    """Compute the information of a fair bit flipped with this probability: log 2 minus the entropy of the flip."""
    return math.log(2) + flip * math.log(flip) + (1 - flip) * math.log(1 - flip)


@pytest.mark.parametrize(
    ("counts", "nats", "normalized"),
    [
        ([[5, 0, 0], [0, 5, 0], [0, 0, 5]], math.log(3), 1.0),  # one code per source
        ([[0, 5], [5, 0]], math.log(2), 1.0),
        ([[4, 8], [3, 6], [1, 2]], 0.0, 0.0),  # independent
        ([[7, 3, 2]], 0.0, 0.0),  # one code for everything
        ([[7], [3]], 0.0, 0.0),  # one source
        ([[9]], 0.0, 0.0),
        ([[45, 5], [5, 45]], channel(0.1), channel(0.1) / math.log(2)),
        ([[30, 10], [10, 30]], channel(0.25), channel(0.25) / math.log(2)),
        # Two codes per source: the code determines the source, the source determines half of the code.
        ([[3, 0], [3, 0], [0, 3], [0, 3]], math.log(2), 2 / 3),
    ],
)
def test_mutual_information_closed_forms(counts: list[list[int]], nats: float, normalized: float) -> None:
    one, other = labels_from_counts(counts)
    assert mutual_information(one, other) == pytest.approx(nats, abs=1e-12)
    assert normalized_information(one, other) == pytest.approx(normalized, abs=1e-12)
    assert mutual_information(other, one) == pytest.approx(nats, abs=1e-12)
    assert mutual_information(one, other) >= 0


@pytest.mark.parametrize("seed", range(5))
def test_mutual_information_matches_scikit_learn(seed: int) -> None:
    draw = np.random.default_rng(seed)
    one = draw.integers(0, 7, 200)
    other = np.array(["source " + str(value) for value in (one + draw.integers(0, 4, 200)) % 5])
    total = 0.0
    for a in set(one.tolist()):
        for b in set(other.tolist()):
            both = sum(x == a and y == b for x, y in zip(one, other, strict=True)) / 200
            if both:
                total += both * math.log(both / (np.mean(one == a) * np.mean(other == b)))
    assert mutual_information(one, other) == pytest.approx(total, rel=1e-12)
    assert mutual_information(one, other) == pytest.approx(mutual_info_score(one, other), rel=1e-12)
    assert normalized_information(one, other) == pytest.approx(normalized_mutual_info_score(one, other), rel=1e-12)


def test_shuffled_information_equals_bias() -> None:
    """The bias for unrelated labels is (K - 1)(S - 1) / 2n nats."""
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 8, 1000), draw.integers(0, 5, 1000)
    bias = 7 * 4 / 2000
    assert shuffled_information(one, other, range(1000), seed=1, times=400) == pytest.approx(bias, rel=0.05)
    assert mutual_information(one, other) == pytest.approx(bias, rel=0.6)
    assert shuffled_information(one, one, range(1000), seed=1, times=400) == pytest.approx(7 * 7 / 2000, rel=0.05)


def test_shuffled_information_of_labels_by_prompt() -> None:
    """Random labels of 40 prompts with 4 to 8 pairs: chance is high, and shuffled pairs would miss most of it."""
    draw = np.random.default_rng(4)
    prompts = np.repeat(np.arange(40), draw.integers(4, 9, 40))
    found = []
    for seed in range(20):
        one, other = draw.integers(0, 8, 40)[prompts], draw.integers(0, 5, 40)[prompts]
        order = draw.permutation(len(prompts))
        chance = shuffled_information(one[order], other[order], prompts[order], seed)
        found.append((mutual_information(one, other), chance, shuffled_information(one, other, range(len(one)), seed)))
    value, chance, by_pair = np.mean(found, axis=0)
    assert chance == pytest.approx(value, rel=0.1)
    assert by_pair < value / 3


def test_labels_are_shuffled_between_prompts() -> None:
    """Prompt x gets both labels of y, and keeps one that y has no place for. Each label is used once, in any order."""
    seen = set[tuple[int, ...]]()

    def look(_: ArrayLike, second: ArrayLike) -> float:
        seen.add(tuple(np.asarray(second).tolist()))
        return 0.0

    for seed in range(300):
        shuffled_mean(look, range(5), list("abcde"), list("xyxyx"), seed, times=1)
    pairs = [(x, y) for kept in (0, 2, 4) for x in permutations((kept, 1, 3)) for y in permutations({0, 2, 4} - {kept})]
    assert seen == {(x[0], y[0], x[1], y[1], x[2]) for x, y in pairs}


@pytest.mark.parametrize("prompts", [1, 2, 3, 5, 200])
def test_chance_with_few_prompts(prompts: int) -> None:
    """Codes are the labels, drawn pair by pair: chance is that of shuffled pairs, however few prompts there are."""
    labels = np.random.default_rng(0).integers(8, size=600)
    chance = shuffled_information(labels, labels, np.arange(600) % prompts, seed=1)
    assert chance == pytest.approx(shuffled_information(labels, labels, range(600), seed=1), abs=0.02)
    assert mutual_information(labels, labels) > 2


@pytest.mark.parametrize("sizes", [[300] + [1] * 300, [100, 50, 25, 12, 6, 3, 2, 1], list(range(5, 45))])
def test_chance_with_prompts_of_unequal_size(sizes: list[int]) -> None:
    """Labels of pairs: purity is that of shuffled pairs. A label of a small prompt is not repeated over a large one."""
    draw, prompts = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    codes, labels = (draw.integers(5, size=len(prompts)) for _ in range(2))
    alone = shuffled_mean(purity, codes, labels, range(len(prompts)), seed=1)
    assert shuffled_mean(purity, codes, labels, prompts, seed=1) == pytest.approx(alone, abs=0.02)


def test_chance_of_prompts_with_labels_of_their_own() -> None:
    """Prompts of 5 to 44 pairs with one code and one label each, unrelated: chance is their information."""
    found = []
    for seed in range(30):
        draw, prompts = np.random.default_rng(seed), np.repeat(np.arange(40), np.arange(5, 45))
        codes, labels = (draw.integers(4, size=40)[prompts] for _ in range(2))
        alone = shuffled_information(codes, labels, range(len(prompts)), seed)
        found.append((mutual_information(codes, labels), shuffled_information(codes, labels, prompts, seed), alone))
    information, chance, alone = np.mean(found, axis=0)
    assert chance == pytest.approx(information, rel=0.25)
    assert alone < 0.1 * information


def test_shuffled_information_depends_on_seed_only() -> None:
    one, other = labels_from_counts([[3, 4], [5, 6]])
    before = np.random.get_state()[1].tolist()  # type: ignore[index]
    drawn = [shuffled_information(one, other, range(18), seed) for seed in (2**62, 2**62, 2, 3)]
    assert drawn[0] == drawn[1]
    assert drawn[2] != drawn[3]
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index]


def test_contingency_order_of_values() -> None:
    assert contingency([3, 1, 3, 3], ["b", "a", "a", "b"]).tolist() == [[1, 0], [1, 2]]


def test_entropy_closed_forms() -> None:
    assert entropy([4, 4, 4, 4]) == pytest.approx(math.log(4))
    assert entropy([5, 0]) == 0
    assert math.copysign(1, entropy([5])) == 1
    assert entropy([0.2, 0.6]) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))


def test_quantile_bins_with_and_without_ties() -> None:
    draw = np.random.default_rng(0)
    values = draw.normal(size=400)
    bins = quantile_bins(values)
    assert np.bincount(bins).tolist() == [100] * 4
    assert all(values[bins == low].max() < values[bins == low + 1].min() for low in range(3))
    ties = quantile_bins([0, 0, 0, 0, 0, 5, 7, 9])
    assert len(set(ties[:5].tolist())) == 1
    assert len(set(quantile_bins([2.0] * 9).tolist())) == 1
    assert quantile_bins([3.0]).shape == (1,)
