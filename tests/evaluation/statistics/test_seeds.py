"""Tests of estimates over seeds, against calculations by hand, scipy, and all sign patterns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from lpc_lightning.evaluation.statistics.seeds import Estimate, estimate, paired_difference, sign_flip_test


def test_estimate_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1; t at 0.975 with 2 degrees of freedom is 0.95 sqrt(2 / 0.0975 / 1)."""
    # F(t) = 1/2 + t / (2 sqrt(2 + t^2)) for 2 degrees of freedom, solved for 0.975.
    t = sqrt(2 * 0.95**2 / (1 - 0.95**2))
    actual = estimate([1.0, 2.0, 3.0])
    assert (actual.n, actual.mean, actual.deviation) == (3, 2, 1)
    assert actual.low == pytest.approx(2 - t / sqrt(3), rel=1e-12)
    assert actual.high == pytest.approx(2 + t / sqrt(3), rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_estimate_interval_equals_scipy(count: int) -> None:
    values = np.random.default_rng(count).normal(0.7, 0.1, count)
    actual = estimate(values.tolist())
    expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert (actual.low, actual.high) == pytest.approx(expected, rel=1e-12)


def test_estimate_interval_coverage() -> None:
    """For 2000 samples of four normal values, 95 % of the intervals contain the mean."""
    draws = np.random.default_rng(0).normal(0.3, 2.0, (2000, 4))
    covered = [actual.low <= 0.3 <= actual.high for actual in (estimate(row.tolist()) for row in draws)]  # type: ignore[operator]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_estimate_of_one_seed() -> None:
    assert estimate([0.7]) == Estimate(1, 0.7)
    actual = paired_difference([0.5], [0.7])
    assert actual.estimate == Estimate(1, pytest.approx(0.2))  # type: ignore[arg-type]
    assert (actual.p_value, actual.p_signs) == (None, None)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [float("inf")]])
def test_estimate_rejects_invalid_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected finite numbers, at least one"):
        estimate(values)


def test_paired_difference_rejects_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="found 1 and 2 values, expected the same number"):
        paired_difference([0.1], [0.1, 0.2])


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_paired_difference_equals_scipy(count: int) -> None:
    draw = np.random.default_rng(count)
    baseline = draw.normal(0.6, 0.1, count)
    other = baseline + draw.normal(0.05, 0.04, count)
    actual = paired_difference(baseline.tolist(), other.tolist())
    expected = stats.ttest_rel(other, baseline)
    assert actual.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (actual.estimate.low, actual.estimate.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert actual.estimate.mean == pytest.approx((other - baseline).mean(), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_sign_flip_test_tries_all_patterns(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.3, 1.0, count)
    means = [abs(np.mean(differences * signs)) for signs in product((1, -1), repeat=count)]
    expected = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    assert sign_flip_test(differences) == pytest.approx(expected, rel=1e-12)


def share_at_least(counts: Sequence[int]) -> float:
    """Return the share of sign patterns whose sum of integers is at least as far from 0 as the observed one."""
    ways = Counter({0: 1})
    for count in counts:
        flipped = Counter[int]()
        for total, number in ways.items():
            flipped.update({total + count: number})
            flipped.update({total - count: number})
        ways = flipped
    return sum(number for total, number in ways.items() if abs(total) >= abs(sum(counts))) / 2 ** len(counts)


@pytest.mark.parametrize("items", [976, 1952, 294, 7])
@pytest.mark.parametrize("count", [2, 5, 8, 13])
def test_sign_flip_test_counts_ties(items: int, count: int) -> None:
    """Differences of accuracies are k / N up to rounding. Sign patterns tie if their sums of the integers k do."""
    draw = np.random.default_rng(count)
    for _ in range(10):
        baseline = draw.integers(items // 2, items, count)
        counts = draw.integers(-3, 4, count)
        actual = paired_difference((baseline / items).tolist(), ((baseline + counts) / items).tolist())
        assert actual.p_signs == pytest.approx(share_at_least(counts.tolist()), rel=1e-12)


def test_sign_flip_test_by_hand() -> None:
    """Differences 1 -1 1 1 -1 1, in 976 pairs: all patterns but the 20 with a sum of 0 are at least as far from 0."""
    baseline, other = np.array([[797, 576, 731, 605, 494, 675], [798, 575, 732, 606, 493, 676]]) / 976
    actual = paired_difference(baseline.tolist(), other.tolist())
    assert actual.p_signs == (64 - 20) / 64


@pytest.mark.parametrize("count", [17, 40])
def test_sign_flip_test_counts_ties_of_draws(count: int) -> None:
    """With more than 2^16 patterns, 2^16 are drawn. 0.01 is five standard errors of their share."""
    draw = np.random.default_rng(count)
    baseline, counts = draw.integers(500, 900, count), draw.integers(-1, 2, count)
    actual = sign_flip_test((baseline + counts) / 976 - baseline / 976)
    assert actual == pytest.approx(share_at_least(counts.tolist()), abs=0.01)
    assert actual == sign_flip_test((baseline + counts) / 976 - baseline / 976)


def test_sign_flip_test_of_few_seeds() -> None:
    assert sign_flip_test(np.array([0.1, 0.2, 0.3, 0.1, 0.4])) == pytest.approx(2 / 2**5)


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_paired_difference_of_equal_differences(shift: float) -> None:
    """The differences are 0.1 up to rounding. Without the special case, t would be about 1e15."""
    baseline = [0.3, 0.6, 0.7]
    actual = paired_difference(baseline, [value + shift for value in baseline])
    assert actual.p_value == actual.p_signs == pytest.approx(0.25)


def test_paired_difference_of_equal_values() -> None:
    actual = paired_difference([0.3, 0.6, 0.7], [0.3, 0.6, 0.7])
    assert (actual.estimate.mean, actual.p_value, actual.p_signs) == (0, 1, 1)
