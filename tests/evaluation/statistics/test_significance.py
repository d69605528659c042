"""Tests of significance tests, against enumeration of all outcomes and closed forms."""

from __future__ import annotations

from itertools import combinations, product
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats

from lpc_lightning.evaluation.statistics import significance
from lpc_lightning.evaluation.statistics.significance import RESAMPLES, holm, paired_test


def answers(both: int, gained: int, lost: int, neither: int) -> tuple[list[float], list[float]]:
    """Make 0/1 scores of a baseline and a model, with the given number of items of each of the four kinds."""
    baseline = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    other = [1.0] * both + [1.0] * gained + [0.0] * lost + [0.0] * neither
    return baseline, other


# McNemar


@pytest.mark.parametrize(("gained", "lost"), [(0, 1), (1, 1), (3, 0), (5, 1), (2, 9), (8, 4)])
def test_mcnemar_equals_enumeration(gained: int, lost: int) -> None:
    """Under the null hypothesis, the two scores of an item can be swapped. Count all combinations of swaps."""
    differences = [abs(sum(signs)) for signs in product((1, -1), repeat=gained + lost)]
    expected = sum(difference >= abs(gained - lost) for difference in differences) / len(differences)
    actual = paired_test(*answers(both=4, gained=gained, lost=lost, neither=2))
    assert actual.p_value == pytest.approx(expected, rel=1e-12)
    assert actual.method == "McNemar"
    assert actual.items == 6 + gained + lost
    assert actual.difference == pytest.approx((gained - lost) / (6 + gained + lost), rel=1e-12)


def test_mcnemar_of_equal_models() -> None:
    actual = paired_test(*answers(3, 0, 0, 5))
    assert (actual.difference, actual.p_value) == (0, 1)
    assert actual.low < 0 < actual.high


def test_mcnemar_interval_by_hand() -> None:
    """20 items, 7 gained, 2 lost: shares 8/22 and 3/22, difference 5/22, variance (11/22 - 25/484) / 22."""
    actual = paired_test(*answers(6, 7, 2, 5))
    half = 1.959963984540054 * sqrt((0.5 - 25 / 484) / 22)
    assert actual.low == pytest.approx(5 / 22 - half, rel=1e-12)
    assert actual.high == pytest.approx(5 / 22 + half, rel=1e-12)


def test_mcnemar_interval_is_at_most_one() -> None:
    actual = paired_test([0.0, 0.0], [1.0, 1.0])
    assert actual.high == 1


@pytest.mark.parametrize(("up", "down"), [(0.1, 0.1), (0.3, 0.05), (0.02, 0.02), (0.4, 0.3)])
def test_mcnemar_coverage_and_error_rate(up: float, down: float) -> None:
    """Sum the probabilities of all outcomes of 30 items whose interval covers the truth, and of those with p < 0.05."""
    items, covered, rejected = 30, 0.0, 0.0
    for gained in range(items + 1):
        for lost in range(items + 1 - gained):
            combinations_count = comb(items, gained) * comb(items - gained, lost)
            probability = combinations_count * up**gained * down**lost * (1 - up - down) ** (items - gained - lost)
            actual = paired_test(*answers(items - gained - lost, gained, lost, 0))
            covered += probability * (actual.low <= up - down <= actual.high)
            rejected += probability * (actual.p_value < 0.05)
    assert covered > 0.94
    if up == down:
        assert rejected <= 0.05


# The bootstrap

DIFFERENCES = np.array([0.31, -0.12, 0.4, 0.05, -0.03, 0.22])


@pytest.fixture(scope="module")
def every_resample() -> np.ndarray:
    """Means of all 6^6 resamples of six items."""
    return np.array([np.mean(resample) for resample in product(DIFFERENCES, repeat=len(DIFFERENCES))])


def test_bootstrap_equals_all_resamples(every_resample: np.ndarray) -> None:
    baseline = np.array([0.2, 0.5, 0.1, 0.9, 0.4, 0.3])
    actual = paired_test(baseline, baseline + DIFFERENCES)
    share = (every_resample <= 0).mean()
    assert actual.method == "bootstrap"
    assert actual.difference == pytest.approx(DIFFERENCES.mean(), rel=1e-9)
    assert actual.p_value == pytest.approx(2 * share, abs=8 * sqrt(share * (1 - share) / RESAMPLES))
    interval = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.95)
    assert (actual.low, actual.high) == pytest.approx((interval.low, interval.high))


def test_bootstrap_of_exchanged_models() -> None:
    one = paired_test(np.zeros(6), DIFFERENCES)
    other = paired_test(DIFFERENCES, np.zeros(6))
    assert other.difference == -one.difference
    assert other.p_value == pytest.approx(one.p_value, abs=0.02)
    assert other.low == pytest.approx(-one.high)


def test_bootstrap_depends_on_seed() -> None:
    actual = [paired_test(np.zeros(6), DIFFERENCES, seed) for seed in (1, 1, 2)]
    assert actual[0] == actual[1] != actual[2]


@pytest.mark.parametrize("items", [2, 3, 5, 8])
def test_bootstrap_of_few_items(items: int) -> None:
    """All items differ by 0.5, and so do all resamples. By chance, all have the same sign in 2 of 2^n cases."""
    actual = paired_test([0.1] * items + [0.2] * 4, [0.6] * items + [0.2] * 4)
    assert actual.p_value >= 2 / 2**items


def test_bootstrap_of_equal_models() -> None:
    actual = paired_test([0.1, 0.7], [0.1, 0.7])
    assert (actual.method, actual.difference, actual.low, actual.high, actual.p_value) == ("bootstrap", 0, 0, 0, 1)


def test_bootstrap_coverage_and_error_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test 400 pairs of models that differ by 0.1 on average, and 400 that do not, on 60 items of skewed scores."""
    monkeypatch.setattr(significance, "RESAMPLES", 1000)
    random = np.random.default_rng(5)
    covered = rejected = 0
    for seed in range(400):
        noise = random.exponential(size=60) - 1
        different = paired_test(np.zeros(60), 0.1 + noise, seed)
        equal = paired_test(np.zeros(60), noise, seed)
        covered += different.low <= 0.1 <= different.high
        rejected += equal.p_value < 0.05
    assert 0.90 < covered / 400 < 0.975
    assert 0.02 < rejected / 400 < 0.10


@pytest.mark.parametrize(
    ("baseline", "other", "message"),
    [
        ([1.0], [1.0], "found 1 and 1 items, expected the same number of each, at least 2"),
        ([1.0, 0.0], [1.0, 0.0, 1.0], "found 2 and 3 items"),
        ([0.5, float("nan")], [0.5, 0.1], "not a finite number"),
    ],
)
def test_paired_test_rejects_invalid_scores(baseline: list[float], other: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_test(baseline, other)


# Holm


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_holm_equals_closure_of_bonferroni(count: int) -> None:
    """A hypothesis is rejected if Bonferroni rejects every set that contains it. Try all sets."""
    random = np.random.default_rng(count)
    for _ in range(20):
        p_values = (random.random(count) ** 3).round(2).tolist()
        sets = [chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)]
        expected = [
            max(
                min(1.0, len(chosen) * min(p_values[member] for member in chosen)) for chosen in sets if index in chosen
            )
            for index in range(count)
        ]
        assert holm(p_values) == pytest.approx(expected, rel=1e-12)


def test_holm_of_no_values() -> None:
    assert holm([]) == []
