"""What some seeds say about all seeds: means and paired differences, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
MOST_FLIPPED = 16
"""Differences whose 2^n sign patterns are all tried; of more, as many patterns are drawn."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds."""

    n: int
    mean: float
    deviation: float | None = None
    """Standard deviation over seeds (n - 1 in the denominator). None for one seed, like both ends."""
    low: float | None = None
    """Lower end of the 95 % confidence interval of the mean."""
    high: float | None = None
    """Its upper end."""


@dataclass(frozen=True, slots=True)
class SeedDifference:
    """How much higher a setting scores than the baseline under the same seeds."""

    estimate: Estimate
    """Of the differences."""
    p_value: float | None = None
    """Two-sided, of the paired t-test; where all differences are equal, and t is not defined, that of sign flips. None
    for one pair."""
    p_signs: float | None = None
    """Two-sided, of the sign-flip test, which assumes no normal distribution. Never below 2^(1 - n). None for one pair.
    """


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, and Student's interval for it.

    Source: Student 1908, "The probable error of a mean".

    Args:
        values: One a seed, at least one, all finite.

    Raises:
        ValueError: None at all, or one that is not finite.
    """
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"estimate: found {list(values)}, expected finite numbers, at least one.")
    if len(found) == 1:
        return Estimate(1, float(found[0]))
    mean, deviation = float(found.mean()), float(found.std(ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(found) - 1)) * deviation / len(found) ** 0.5
    return Estimate(len(found), mean, deviation, mean - half, mean + half)


def paired_difference(baseline: Sequence[float], other: Sequence[float]) -> SeedDifference:
    """Other less baseline, seed by seed.

    Args:
        baseline: One value a seed.
        other: As many, of the same seeds in the same order.

    Raises:
        ValueError: Other than as many, none at all, or one that is not finite.
    """
    if len(baseline) != len(other):
        raise ValueError(f"paired_difference: found {len(baseline)} and {len(other)} values, expected as many.")
    differences = np.asarray(other, dtype=float) - np.asarray(baseline, dtype=float)
    found = estimate(differences.tolist())
    if found.deviation is None:
        return SeedDifference(found)
    p_signs = sign_flip_test(differences)
    # Differences that are equal but for rounding have no t.
    scale = max(np.abs(baseline).max(), np.abs(other).max())
    if found.deviation <= 1e-12 * scale:
        return SeedDifference(found, p_signs, p_signs)
    return SeedDifference(found, float(stats.ttest_1samp(differences, 0.0).pvalue), p_signs)


def sign_flip_test(differences: NDArray[np.float64]) -> float:
    """The share of sign patterns whose mean is as far from 0, or farther: each difference may as well be the other way.

    Exact up to 16 differences. Source: Fisher 1935, "The Design of Experiments", section 21.

    Args:
        differences: (n,) at least two.
    """
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**MOST_FLIPPED,
        alternative="two-sided",
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
