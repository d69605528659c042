"""Tests of whether two models differ, from their scores on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from lpc_lightning.clustered_means import cluster_sums, degrees_of_freedom, shares, standard_error
from lpc_lightning.evaluation.statistics.seeds import CONFIDENCE, TIE, sign_flip_test

PATTERNS = 10_000
"""Largest number of sign patterns that a test tries. The p-values have a resolution of 0.0001."""


@dataclass(frozen=True, slots=True)
class PairedTest:
    """The difference between a model and the baseline, with its significance."""

    method: str
    """`McNemar`, `sign flips`, or `prompts`: sign flips of all items of a prompt together."""
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


def paired_test(baseline: Sequence[float], other: Sequence[float], clusters: Sequence[Any] | None = None) -> PairedTest:
    """Test whether two models differ.

    If several items share a cluster, the test flips the signs of whole clusters. Otherwise it is McNemar's test if all
    scores are 0 or 1, and flips the signs of items if not. (A bootstrap would reject a true null in 13 % of cases with
    six items.) The interval is Student's, over clusters or items, except for McNemar's test.

    Args:
        baseline: The baseline's score on each item, at least two items.
        other: The other model's scores, on the same items in the same order.
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
        return _flip_signs("prompts", second - first, clusters)
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return _mcnemar(first, second)
    return _flip_signs("sign flips", second - first, range(len(first)))


def _flip_signs(method: str, differences: np.ndarray, clusters: Sequence[Any]) -> PairedTest:
    """Flip the signs of whole clusters for the p-value.

    Clusters without a difference have no influence on the p-value.
    """
    sums, _ = cluster_sums(differences, clusters)
    if len(sums) < 2:
        raise ValueError(f"paired_test: found {len(differences)} items of one cluster, expected at least two clusters.")
    differing = sums[np.abs(sums) > TIE * np.abs(differences).sum()]
    p_value = sign_flip_test(differing, PATTERNS) if len(differing) > 1 else 1.0
    interval = _student(differences, clusters)
    return PairedTest(method, len(differences), float(differences.mean()), *interval, p_value)


def _student(differences: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """Return Student's interval of the mean, with the standard error over clusters."""
    error = standard_error(differences, clusters)
    assert error is not None
    freedom = degrees_of_freedom(shares(clusters).values())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
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
