"""Tests of whether two models differ, from their scores on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from lpc_lightning.evaluation.statistics.clusters import cluster_sums, standard_error
from lpc_lightning.evaluation.statistics.seeds import CONFIDENCE, sign_flip_test

RESAMPLES = 10_000
"""Number of bootstrap resamples. The p-values have a resolution of 0.0002."""


@dataclass(frozen=True, slots=True)
class PairedTest:
    """The difference between a model and the baseline, with its significance."""

    method: str
    """`McNemar`, `bootstrap`, or `prompts`: sign flips of all items of a prompt together."""
    items: int
    """Number of items. Both models answered each of them."""
    difference: float
    """Mean score of the model minus mean score of the baseline."""
    low: float
    """Lower end of the 95 % confidence interval of the difference."""
    high: float
    """Upper end of that interval."""
    p_value: float
    """Two-sided p-value: the probability of a difference this large if the models do not differ."""


def paired_test(
    baseline: Sequence[float], other: Sequence[float], seed: int = 0, clusters: Sequence[Any] | None = None
) -> PairedTest:
    """Test whether two models differ.

    If several items share a cluster, the test flips whole clusters. Otherwise it is McNemar's test if all scores are 0
    or 1, and a paired bootstrap if not. The interval is Student's, over clusters or items, except for McNemar's test:
    percentiles of resamples are too narrow for few of them.

    Args:
        baseline: The baseline's score on each item, at least two items.
        other: The other model's scores, on the same items in the same order.
        seed: Seed of the bootstrap.
        clusters: The cluster of each item, such as its prompt. None: all items are independent.

    Raises:
        ValueError: There are fewer than two items or clusters, the numbers of items differ, or a score is not finite.
    """
    first, second = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(
            f"paired_test: found {len(first)} and {len(second)} items, expected the same number of each, at least 2."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("paired_test: found a score that is not a finite number, expected finite scores only.")
    if clusters is not None and len(set(clusters)) < len(first):
        return _by_cluster(second - first, clusters)
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return _mcnemar(first, second)
    return _bootstrap(second - first, seed)


def _by_cluster(differences: np.ndarray, clusters: Sequence[Any]) -> PairedTest:
    """Flip the signs of whole clusters for the p-value.

    Clusters without a difference have no influence on the p-value.
    """
    sums, _ = cluster_sums(differences, clusters)
    if len(sums) < 2:
        raise ValueError(f"paired_test: found {len(differences)} items of one cluster, expected at least two clusters.")
    differing = sums[sums != 0]
    p_value = sign_flip_test(differing, RESAMPLES) if len(differing) > 1 else 1.0
    interval = _student(differences, clusters)
    return PairedTest("prompts", len(differences), float(differences.mean()), *interval, p_value)


def _student(differences: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """Return Student's interval of the mean, with the standard error over clusters."""
    error = standard_error(differences, clusters)
    assert error is not None
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(set(clusters)) - 1)) * error
    return float(differences.mean()) - half, float(differences.mean()) + half


def _mcnemar(baseline: np.ndarray, other: np.ndarray) -> PairedTest:
    """Apply the exact binomial test to the items that only one of the models gets right (McNemar 1947).

    The interval is Wald's interval after adding one such item for each model. It has good coverage in small samples
    (Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired
    data").
    """
    gained, lost = int((other > baseline).sum()), int((other < baseline).sum())
    up, down = (gained + 1) / (len(other) + 2), (lost + 1) / (len(other) + 2)
    half = stats.norm.ppf(0.975) * np.sqrt((up + down - (up - down) ** 2) / (len(other) + 2))
    return PairedTest(
        method="McNemar",
        items=len(other),
        difference=(gained - lost) / len(other),
        low=max(-1.0, float(up - down - half)),
        high=min(1.0, float(up - down + half)),
        p_value=float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    )


def _bootstrap(differences: np.ndarray, seed: int) -> PairedTest:
    """Resample items for the p-value (Efron and Tibshirani 1993, chapter 16).

    The p-value is twice the share of resamples on the other side of 0. It is at least 2^(1 - m), where m is the number
    of items that differ. That is the p-value of the sign test if all m items have the same sign. Without this bound, a
    bootstrap of three items could be far too significant.
    """
    differing = int((differences != 0).sum())
    if not differing:
        return PairedTest("bootstrap", len(differences), 0.0, 0.0, 0.0, 1.0)
    draws = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // len(differences)),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    means = draws.bootstrap_distribution
    low, high = _student(differences, range(len(differences)))
    beyond = 1 + min(int((means <= 0).sum()), int((means >= 0).sum()))
    return PairedTest(
        method="bootstrap",
        items=len(differences),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=min(1.0, max(2 * beyond / (RESAMPLES + 1), 2.0 ** (1 - differing))),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple testing, so that the family-wise error rate stays at the chosen level.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: P-values in any order. May be empty.

    Returns:
        The corrected p-values in the same order. The k-th smallest of n is multiplied by n + 1 - k. It is at least the
        corrected value before it, and at most 1.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
