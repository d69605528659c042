"""Tests of statistics over clusters, against closed forms, enumeration and simulations with a true null."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest
from scipy import stats

from lpc_lightning.evaluation.statistics.clusters import cluster_sums, standard_error
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
    """Mean 2.75/6; S = 2 - 2 m, 1.75 - 3 m, -1 - m."""
    mean = 2.75 / 6
    squares = (2 - 2 * mean) ** 2 + (1.75 - 3 * mean) ** 2 + (-1 - mean) ** 2
    assert standard_error(VALUES, CLUSTERS) == pytest.approx(sqrt(1.5 * squares) / 6, rel=1e-12)


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
