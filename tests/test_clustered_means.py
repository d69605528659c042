"""Tests of statistics over clusters, against closed forms, enumeration and simulations with a true null."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from lpc_lightning.clustered_means import (
    cluster_scores,
    cluster_sums,
    degrees_of_freedom,
    deviations,
    shares,
    standard_error,
)
from lpc_lightning.evaluation.statistics.significance import paired_test

CLUSTERS = ["b", "a", "b", "c", "a", "b"]
VALUES = [1.0, 0.0, 0.5, -1.0, 2.0, 0.25]


def dependent_differences(draw: np.random.Generator, clusters: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw differences between two equally good models: half of each variance is shared within a cluster."""
    shared = draw.normal(size=(clusters, 1))
    return (shared + draw.normal(size=(clusters, size))).ravel(), np.repeat(np.arange(clusters), size)


def test_cluster_sums_by_hand() -> None:
    sums, sizes = cluster_sums(VALUES, CLUSTERS)
    assert sums.tolist() == [2.0, 1.75, -1.0]
    assert sizes.tolist() == [2, 3, 1]


def test_standard_error_of_independent_values() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert standard_error(values) == pytest.approx(stats.sem(values), rel=1e-12)
    assert standard_error(values, range(50)) == pytest.approx(stats.sem(values), rel=1e-12)


def test_standard_error_by_hand() -> None:
    """Mean 2.75/6; without a, b or c it is 0.75/4, 1/3 or 3.75/5."""
    mean, without = 2.75 / 6, (0.75 / 4, 1 / 3, 3.75 / 5)
    expected = sqrt(2 / 3 * sum((mean - each) ** 2 for each in without))
    assert standard_error(VALUES, CLUSTERS) == pytest.approx(expected, rel=1e-12)
    assert cluster_scores(VALUES, CLUSTERS).variance == pytest.approx(expected**2, rel=1e-12)
    assert cluster_scores([1.0, 2.0], ["a", "a"]).variance is None
    added = {name: 2 / 3 * (mean - each) for name, each in zip("abc", without, strict=True)}
    assert deviations(VALUES, CLUSTERS) == pytest.approx(added, rel=1e-12)
    assert deviations([1.0, 2.0], ["a", "a"]) == {"a": 0.0}


def test_degrees_of_freedom_by_hand() -> None:
    assert shares(CLUSTERS) == {"a": 2 / 6, "b": 3 / 6, "c": 1 / 6}
    assert degrees_of_freedom([2, 3, 1]) == pytest.approx(36 / 14 - 1)
    assert degrees_of_freedom([0.2] * 5) == pytest.approx(4)
    assert degrees_of_freedom([1000, 1, 1, 1]) == 1, "a single one has almost all values"


def test_standard_error_of_equal_clusters() -> None:
    values = np.random.default_rng(1).normal(size=(12, 5))
    clusters = np.repeat(np.arange(12), 5)
    assert standard_error(values.ravel(), clusters) == pytest.approx(stats.sem(values.mean(1)), rel=1e-12)


def test_standard_error_of_one_cluster() -> None:
    assert standard_error([0.0, 1.0, 1.0], ["a", "a", "a"]) is None


def test_standard_error_of_dependent_values() -> None:
    draw = np.random.default_rng(2)
    sets = [dependent_differences(draw, 40, 4) for _ in range(400)]
    deviation = np.std([values.mean() for values, _ in sets])
    errors = [standard_error(values, clusters) for values, clusters in sets]
    assert np.mean(errors) == pytest.approx(deviation, rel=0.1)  # type: ignore[arg-type]
    assert np.mean([standard_error(values) for values, _ in sets]) < 0.75 * deviation


def test_paired_test_flips_whole_clusters() -> None:
    """The p-value is the share of the sign patterns of clusters. Items that do not differ change nothing."""
    draw = np.random.default_rng(3)
    baseline, other = (draw.integers(0, 2, 24).astype(float) for _ in range(2))
    clusters = np.arange(24) // 3
    sums = (other - baseline).reshape(8, 3).sum(1)
    patterns = [abs(np.dot(sums, signs)) for signs in product((1, -1), repeat=8)]
    actual = paired_test(baseline.tolist(), other.tolist(), clusters=clusters.tolist())
    assert actual.p_value == pytest.approx(np.mean(np.array(patterns) >= abs(sums.sum()) - 1e-12), rel=1e-12)
    assert (actual.method, actual.items) == ("prompts", 24)
    assert actual.difference == pytest.approx((other - baseline).mean(), rel=1e-12)
    assert actual.low <= actual.difference <= actual.high


def test_paired_test_of_distinct_clusters() -> None:
    scores = [0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]
    assert paired_test(*scores, clusters=["a", "b", "c", "d"]) == paired_test(*scores)


def test_paired_test_of_one_cluster() -> None:
    with pytest.raises(ValueError, match="found 3 items of one cluster, expected at least two"):
        paired_test([0.0, 1.0, 1.0], [1.0, 1.0, 0.0], clusters=["a", "a", "a"])


def test_paired_test_false_positive_rate() -> None:
    """At 0.05, a true null is rejected in 3 to 7 % of sets. Without clusters it is rejected far more often."""
    draw = np.random.default_rng(4)
    rejected, covered, naive = [], [], []
    for _ in range(200):
        differences, clusters = dependent_differences(draw, 40, 4)
        zeros = np.zeros(len(differences)).tolist()
        test = paired_test(zeros, differences.tolist(), clusters=clusters.tolist())
        rejected.append(test.p_value < 0.05)
        covered.append(test.low <= 0 <= test.high)
        naive.append(stats.ttest_1samp(differences, 0).pvalue < 0.05)
    assert 0.03 <= np.mean(rejected) <= 0.07
    assert 0.03 <= 1 - np.mean(covered) <= 0.08
    assert np.mean(naive) > 0.1


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_interval_of_few_clusters_covers_the_truth(clusters: int) -> None:
    """Twenty pairs of each prompt, whose differences agree by prompt. Percentiles of resamples cover 49 to 83 %."""
    draw, covered = np.random.default_rng(clusters), 0
    for _ in range(300):
        differences, owners = dependent_differences(draw, clusters, 20)
        test = paired_test(np.zeros(len(differences)).tolist(), differences.tolist(), clusters=owners.tolist())
        covered += test.low <= 0 <= test.high
        expected = stats.ttest_1samp(differences.reshape(clusters, 20).mean(1), 0).confidence_interval(0.95)
        assert (test.low, test.high) == pytest.approx((expected.low, expected.high))
    assert 0.92 <= covered / 300 <= 0.98


SKEWED = (1, 2, 3, 4, 5, 6, 8, 11, 16, 31)


@pytest.mark.parametrize(("sizes", "least"), [(SKEWED, 0.03), ((40, *[4] * 9), 0.0)], ids=["skewed", "one of half"])
def test_interval_of_unequal_clusters(sizes: Sequence[int], least: float) -> None:
    """It misses the truth in 3 to 7 % of sets, or in fewer if one cluster has half of the values.

    The error from squared sums, with a degree of freedom for each cluster, gives intervals that miss it in over 9 %.
    """
    draw, missed, naive = np.random.default_rng(7), 0, 0
    owners, counts = np.repeat(np.arange(len(sizes)), sizes), np.array(sizes)
    for _ in range(1000):
        values = draw.normal(size=len(sizes))[owners] + draw.normal(size=len(owners))
        error, mean = standard_error(values, owners), values.mean()
        assert error is not None
        missed += abs(mean) > stats.t.ppf(0.975, degrees_of_freedom(sizes)) * error
        sums = np.bincount(owners, values) - counts * mean
        squares = np.square(sums).sum() * len(sums) / (len(sums) - 1)
        naive += abs(mean) > stats.t.ppf(0.975, len(sums) - 1) * sqrt(squares) / len(values)
    assert least <= missed / 1000 <= 0.07
    assert naive / 1000 > 0.09


def test_paired_test_interval_of_unequal_clusters() -> None:
    owners = np.repeat(np.arange(len(SKEWED)), SKEWED)
    values = np.random.default_rng(3).normal(size=len(owners))
    test = paired_test([0.0] * len(owners), values.tolist(), owners.tolist())
    half = stats.t.ppf(0.975, sum(SKEWED) ** 2 / sum(size**2 for size in SKEWED) - 1) * standard_error(values, owners)
    assert (test.low, test.high) == pytest.approx((values.mean() - half, values.mean() + half))
