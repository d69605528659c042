"""Tests of significance tests, against enumeration of all outcomes and closed forms."""

from __future__ import annotations

from itertools import combinations, product
from math import comb, sqrt

import numpy as np
import pytest
from scipy import stats

from lpc_lightning.evaluation.statistics import significance
from lpc_lightning.evaluation.statistics.significance import holm, paired_test


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


# Sign flips

DIFFERENCES = np.array([0.31, -0.12, 0.4, 0.05, -0.03, 0.22])


def test_sign_flips_equal_enumeration() -> None:
    baseline = np.array([0.2, 0.5, 0.1, 0.9, 0.4, 0.3])
    actual = paired_test(baseline.tolist(), (baseline + DIFFERENCES).tolist())
    sums = [abs(np.dot(signs, DIFFERENCES)) for signs in product((1, -1), repeat=len(DIFFERENCES))]
    assert (actual.method, actual.items) == ("sign flips", 6)
    assert actual.difference == pytest.approx(DIFFERENCES.mean(), rel=1e-9)
    assert actual.p_value == pytest.approx(np.mean(np.array(sums) >= abs(DIFFERENCES.sum()) - 1e-12), rel=1e-12)
    interval = stats.ttest_1samp(DIFFERENCES, 0).confidence_interval(0.95)
    assert (actual.low, actual.high) == pytest.approx((interval.low, interval.high))


def test_sign_flips_of_exchanged_models() -> None:
    one = paired_test([0.0] * 6, DIFFERENCES.tolist())
    other = paired_test(DIFFERENCES.tolist(), [0.0] * 6)
    assert other.difference == -one.difference
    assert other.p_value == one.p_value
    assert other.low == pytest.approx(-one.high)


@pytest.mark.parametrize("items", [2, 3, 5, 8])
def test_sign_flips_of_one_sign(items: int) -> None:
    """All items differ by 0.5. By chance, all have the same sign in 2 of 2^n cases. Equal items change nothing."""
    actual = paired_test([0.1] * items + [0.2] * 4, [0.6] * items + [0.2] * 4)
    assert actual.p_value == pytest.approx(2 / 2**items)


def test_sign_flips_of_sums_up_to_rounding() -> None:
    """Both items of a prompt differ by 0.3, with opposite signs. Their sum is 0, and about 6e-17 as computed."""
    actual = paired_test([0.2, 0.4] * 3, [0.5, 0.1] * 3, clusters=[0, 0, 1, 1, 2, 2])
    assert (actual.method, actual.p_value) == ("prompts", 1)


def test_sign_flips_of_equal_models() -> None:
    actual = paired_test([0.1, 0.7], [0.1, 0.7])
    assert (actual.method, actual.difference, actual.low, actual.high, actual.p_value) == ("sign flips", 0, 0, 0, 1)


@pytest.mark.parametrize("items", [6, 10, 40])
def test_sign_flips_error_rate(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equally good models. At 0.05, a true null is rejected in at most 7 % of sets, also of few items."""
    monkeypatch.setattr(significance, "PATTERNS", 1024)
    draw = np.random.default_rng(items)
    scores = draw.exponential(size=(400, 2, items)).tolist()
    rejected = sum(paired_test(baseline, other).p_value < 0.05 for baseline, other in scores)
    assert 0.02 < rejected / 400 <= 0.07


def test_interval_of_skewed_differences() -> None:
    """Two models that differ by 0.1 on average, on 60 items."""
    noise = np.random.default_rng(5).exponential(size=(400, 60)) - 1
    tests = [paired_test([0.0] * 60, (0.1 + each).tolist()) for each in noise]
    assert 0.92 < np.mean([test.low <= 0.1 <= test.high for test in tests]) < 0.975


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
