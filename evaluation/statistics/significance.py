"""Whether two models differ, from their scores on the same items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000
"""Draws of a bootstrap: its p-values come in steps of 0.0002."""


@dataclass(frozen=True, slots=True)
class PairedTest:
    """How much higher a model scores than the baseline, and how sure that is."""

    method: str
    """`McNemar` or `bootstrap`."""
    items: int
    """Items that both models answered."""
    difference: float
    """Mean score of the model less that of the baseline."""
    low: float
    """Lower end of the 95 % confidence interval of the difference."""
    high: float
    """Its upper end."""
    p_value: float
    """Two-sided: how likely a difference this large is where the models do not differ."""


def paired_test(baseline: Sequence[float], other: Sequence[float], seed: int = 0) -> PairedTest:
    """McNemar's test where all scores are 0 or 1, and a paired bootstrap elsewhere.

    Args:
        baseline: A score for each item, at least two.
        other: The other model's, of the same items in the same order.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: Fewer than two items, another number of them, or a score that is not finite.
    """
    first, second = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise ValueError(f"paired_test: found {len(first)} and {len(second)} items, expected as many, and at least 2.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("paired_test: found a score that is not a finite number.")
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return _mcnemar(first, second)
    return _bootstrap(second - first, seed)


def _mcnemar(baseline: np.ndarray, other: np.ndarray) -> PairedTest:
    """The exact binomial test on the items that one model gets right and the other wrong (McNemar 1947).

    The interval is Wald's after one such item is added to either side, which covers well in small samples too (Bonett
    and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data").
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
    """Percentiles of the mean over items drawn again with replacement (Efron and Tibshirani 1993, chapter 13).

    The p-value is twice the share of draws on the far side of 0. It is no smaller than 2^(1 - m) for m items that
    differ, which is what the sign test gives when all of them go one way: of three items, a bootstrap would be sure.
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
    beyond = 1 + min(int((means <= 0).sum()), int((means >= 0).sum()))
    return PairedTest(
        method="bootstrap",
        items=len(differences),
        difference=float(differences.mean()),
        low=float(draws.confidence_interval.low),
        high=float(draws.confidence_interval.high),
        p_value=min(1.0, max(2 * beyond / (RESAMPLES + 1), 2.0 ** (1 - differing))),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, so that the chance of one false finding or more stays at the level.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".

    Args:
        p_values: In any order; may be empty.

    Returns:
        As many, in the same order: the k-th smallest of n times n + 1 - k, never below the one before, at most 1.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
