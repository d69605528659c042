"""Intervals and tests over seeds, against worked examples, against scipy's own, and against all sign patterns."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from lpc_lightning.evaluation.statistics.seeds import Estimate, estimate, paired_difference, sign_flip_test


def test_the_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1; t at 0.975 with 2 degrees of freedom is 0.95 sqrt(2 / 0.0975 / 1)."""
    # F(t) = 1/2 + t / (2 sqrt(2 + t^2)) for 2 degrees of freedom, solved for 0.975.
    t = sqrt(2 * 0.95**2 / (1 - 0.95**2))
    found = estimate([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.deviation) == (3, 2, 1)
    assert found.low == pytest.approx(2 - t / sqrt(3), rel=1e-12)
    assert found.high == pytest.approx(2 + t / sqrt(3), rel=1e-12)


@pytest.mark.parametrize("count", [2, 3, 5, 30])
def test_the_interval_is_that_of_scipy(count: int) -> None:
    values = np.random.default_rng(count).normal(0.7, 0.1, count)
    found = estimate(values.tolist())
    expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)


def test_the_interval_keeps_its_promise() -> None:
    """Of 2000 samples of four normal values, 95 % of the intervals hold the mean."""
    draws = np.random.default_rng(0).normal(0.3, 2.0, (2000, 4))
    held = [found.low <= 0.3 <= found.high for found in (estimate(row.tolist()) for row in draws)]  # type: ignore[operator]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_one_seed_has_a_mean_and_no_interval() -> None:
    assert estimate([0.7]) == Estimate(1, 0.7)
    found = paired_difference([0.5], [0.7])
    assert found.estimate == Estimate(1, pytest.approx(0.2))  # type: ignore[arg-type]
    assert (found.p_value, found.p_signs) == (None, None)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")], [float("inf")]])
def test_no_numbers_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="expected finite numbers, at least one"):
        estimate(values)


def test_other_than_as_many_values_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="found 1 and 2 values"):
        paired_difference([0.1], [0.1, 0.2])


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_the_paired_test_is_that_of_scipy(count: int) -> None:
    draw = np.random.default_rng(count)
    baseline = draw.normal(0.6, 0.1, count)
    other = baseline + draw.normal(0.05, 0.04, count)
    found = paired_difference(baseline.tolist(), other.tolist())
    expected = stats.ttest_rel(other, baseline)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    interval = expected.confidence_interval(0.95)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.estimate.mean == pytest.approx((other - baseline).mean(), rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_the_sign_test_tries_all_patterns(count: int) -> None:
    differences = np.random.default_rng(count).normal(0.3, 1.0, count)
    means = [abs(np.mean(differences * signs)) for signs in product((1, -1), repeat=count)]
    expected = np.mean([mean >= abs(differences.mean()) - 1e-12 for mean in means])
    assert sign_flip_test(differences) == pytest.approx(expected, rel=1e-12)


def test_few_seeds_are_never_sure_by_signs() -> None:
    assert sign_flip_test(np.array([0.1, 0.2, 0.3, 0.1, 0.4])) == pytest.approx(2 / 2**5)


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_equal_differences_have_no_t(shift: float) -> None:
    """0.1 more each time but for rounding: a t of 1e15, which nobody should believe of three seeds."""
    baseline = [0.3, 0.6, 0.7]
    found = paired_difference(baseline, [value + shift for value in baseline])
    assert found.p_value == found.p_signs == pytest.approx(0.25)


def test_nothing_that_differs_is_no_difference() -> None:
    found = paired_difference([0.3, 0.6, 0.7], [0.3, 0.6, 0.7])
    assert (found.estimate.mean, found.p_value, found.p_signs) == (0, 1, 1)
