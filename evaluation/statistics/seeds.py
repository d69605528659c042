"""Statistics over seeds: means and paired differences, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
"""Coverage of the confidence intervals."""
MAX_EXACT_FLIPS = 16
"""Largest number of differences whose 2^n sign patterns are all tried. For more, 2^16 patterns are drawn."""
TIE = 1e-9
"""Two sums of differences are equal if they differ by at most this share of the sum of absolute differences."""
MIN_PROMPTS = 4
"""Smallest number of prompts, shared by the seeds, for which there is an interval. With two or three, a true null is
rejected too often, and with one the variance between prompts is unknown."""
MIN_EFFECTIVE = 1.5
"""Smallest effective number of these prompts (see `clustered_means.effective_number`) for which there is an interval.
Below it, one prompt has about 0.8 of the pairs or more, and the others do not show how it varies."""


@dataclass(frozen=True, slots=True)
class Shared:
    """The part of a mean's variance that all seeds share, because they are scored on the same test prompts."""

    variance: float | None = 0.0
    """Estimate of the mean covariance between the scores of two seeds, at least 0. None: there are fewer prompts than
    `MIN_PROMPTS`, or effectively fewer than `MIN_EFFECTIVE`."""
    prompts: int = 0
    """Number of prompts that several seeds have."""
    on_record: bool = True
    """False: seeds may share prompts, and what each prompt adds to the scores is not on record."""
    freedom: float = 0.0
    """Degrees of freedom of `variance`; see `clustered_means.degrees_of_freedom`."""
    annotators: int = 0
    """Number of annotators that several seeds have, if the variance covers their choice, too."""


NOTHING_SHARED = Shared()
NOT_ON_RECORD = Shared(on_record=False)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds, with its confidence interval."""

    n: int
    """Number of seeds."""
    mean: float
    deviation: float | None = None
    """Standard deviation over seeds (n - 1 in the denominator). None for a single seed."""
    low: float | None = None
    """Lower end of the 95 % confidence interval of the mean. None for a single seed, or for too few shared prompts."""
    high: float | None = None
    """Upper end of that interval. None in the same cases."""
    prompts: int = 0
    """Number of test prompts that several seeds share. The interval covers the choice of these prompts, too. There is
    none for fewer than `MIN_PROMPTS`, or effectively fewer than `MIN_EFFECTIVE`."""
    annotators: int = 0
    """Number of annotators that several seeds share, if the interval covers their choice, too."""
    over_seeds_alone: bool = False
    """True: the seeds may share test prompts, and the interval does not cover their choice."""


@dataclass(frozen=True, slots=True)
class SeedDifference:
    """The difference between a setting and the baseline, over the same seeds."""

    estimate: Estimate
    """Mean of the differences, setting minus baseline."""
    p_value: float | None = None
    """Two-sided p-value of the paired t-test, with the variance of `estimate`. If that is 0 (all differences are equal,
    and no prompts are shared), t is undefined, and this is `p_signs`. None if `estimate` has no interval, or one over
    seeds alone."""
    p_signs: float | None = None
    """Two-sided p-value of the sign-flip test, which does not assume a normal distribution. At least 2^(1 - n). None
    if `estimate` has no interval."""


def estimate(values: Sequence[float], shared: Shared = NOTHING_SHARED) -> Estimate:
    """Compute the mean and its confidence interval.

    Student's interval covers everything that changes with the seed. If the seeds are scored on the same prompts, their
    values are correlated, and the variance of the mean is s^2 / n + c, with the deviation s over the n seeds and the
    mean covariance c between two seeds. The degrees of freedom then follow from the two parts.

    Sources: Student 1908, "The probable error of a mean". Satterthwaite 1946, "An approximate distribution of estimates
    of variance components".

    Args:
        values: One finite value per seed, at least one.
        shared: The covariance, from `shared_variance`.

    Raises:
        ValueError: `values` is empty, or a value is not finite.
    """
    samples = np.asarray(values, dtype=float)
    if samples.ndim != 1 or not len(samples) or not np.isfinite(samples).all():
        raise ValueError(f"estimate: found {list(values)}, expected finite numbers, at least one.")
    if len(samples) == 1:
        return Estimate(1, float(samples[0]))
    mean, deviation = float(samples.mean()), float(samples.std(ddof=1))
    if shared.variance is None:
        return Estimate(len(samples), mean, deviation, prompts=shared.prompts)
    error, freedom = _standard_error(deviation, len(samples), shared.variance, shared.freedom)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    alone = not shared.on_record
    return Estimate(len(samples), mean, deviation, mean - half, mean + half, shared.prompts, shared.annotators, alone)


def _standard_error(deviation: float, count: int, variance: float, freedom: float) -> tuple[float, float]:
    """Return the standard error of a mean over seeds, and its degrees of freedom."""
    own, total = deviation**2 / count, deviation**2 / count + variance
    if not variance:
        return own**0.5, count - 1
    spread = own**2 / (count - 1) + variance**2 / freedom
    return total**0.5, total**2 / spread


def paired_difference(
    baseline: Sequence[float], other: Sequence[float], shared: Shared = NOTHING_SHARED
) -> SeedDifference:
    """Compute `other` minus `baseline` for each seed, and test whether the mean differs from 0.

    Args:
        baseline: One value per seed.
        other: One value per seed, for the same seeds in the same order.
        shared: The covariance of the differences, from `shared_variance`.

    Raises:
        ValueError: The lengths differ, both are empty, or a value is not finite.
    """
    if len(baseline) != len(other):
        raise ValueError(
            f"paired_difference: found {len(baseline)} and {len(other)} values, expected the same number of each."
        )
    differences = np.asarray(other, dtype=float) - np.asarray(baseline, dtype=float)
    mean = estimate(differences.tolist(), shared)
    if mean.deviation is None or shared.variance is None:
        return SeedDifference(mean)
    p_signs = sign_flip_test(differences)
    if not shared.on_record:
        return SeedDifference(mean, None, p_signs)
    error, freedom = _standard_error(mean.deviation, mean.n, shared.variance, shared.freedom)
    # t is meaningless if nothing but rounding varies.
    if error <= 1e-12 * max(np.abs(baseline).max(), np.abs(other).max()):
        return SeedDifference(mean, p_signs, p_signs)
    return SeedDifference(mean, float(2 * stats.t.sf(abs(mean.mean) / error, freedom)), p_signs)


def sign_flip_test(differences: NDArray[np.float64], patterns: int = 2**MAX_EXACT_FLIPS) -> float:
    """Compute the share of sign patterns whose mean is at least as far from 0 as the observed mean.

    Under the null hypothesis, each difference is as likely to have the opposite sign. Exact if there are at most
    `patterns` patterns. Means that are equal up to rounding are equally far from 0.

    Source: Fisher 1935, "The Design of Experiments", section 21.

    Args:
        differences: (n,) differences, at least two.
        patterns: Maximum number of sign patterns. If there are more, this number is drawn.
    """
    # Differences of accuracies are multiples of 1 / N up to rounding, so that equal sums differ in their last digits.
    threshold = abs(differences.sum()) - TIE * np.abs(differences).sum()

    def is_as_far(flipped: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return (np.abs(flipped.sum(axis)) >= threshold).astype(float)

    test = stats.permutation_test(
        (differences,),
        is_as_far,
        permutation_type="samples",
        vectorized=True,
        n_resamples=patterns,
        batch=max(1, 2**22 // len(differences)),
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)
