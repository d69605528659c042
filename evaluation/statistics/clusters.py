"""Statistics of values that are dependent within clusters, such as several pairs of one prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lpc_lightning.evaluation.statistics.seeds import LEVEL


def cluster_sums(values: ArrayLike, clusters: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return (clusters,) the sum of each cluster's values, and (clusters,) the number of its values.

    Args:
        values: (n,) values.
        clusters: (n,) the cluster of each value.
    """
    _, owner = np.unique(np.asarray(clusters), return_inverse=True)
    sizes: NDArray[np.int64] = np.bincount(owner)
    return np.bincount(owner, np.asarray(values, dtype=float)).astype(np.float64), sizes


def standard_error(values: ArrayLike, clusters: ArrayLike | None = None) -> float | None:
    """Compute the standard error of a mean over values that are dependent within clusters.

    With S_c the sum of a cluster's values minus the mean, and C clusters, it is sqrt(C / (C - 1) sum_c S_c^2) / n. For
    clusters of one value this is the usual standard error. For clusters of equal size it is the standard error of the
    mean of their means.

    Source: Liang and Zeger 1986, "Longitudinal data analysis using generalized linear models".

    Args:
        values: (n,) values, at least one.
        clusters: (n,) the cluster of each value. None: all values are independent.

    Returns:
        The standard error, or None for a single cluster.
    """
    samples = np.asarray(values, dtype=float)
    sums, sizes = cluster_sums(samples, range(len(samples)) if clusters is None else clusters)
    if len(sums) < 2:
        return None
    variation = np.square(sums - samples.mean() * sizes).sum() * len(sums) / (len(sums) - 1)
    return float(variation**0.5 / len(samples))


def bootstrap_interval(
    sums: NDArray[np.float64], sizes: NDArray[np.int64], resamples: int, seed: int
) -> tuple[float, float]:
    """Compute the 95 % percentile interval of a mean by resampling whole clusters.

    Source: Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8.

    Args:
        sums: (C,) sum of each cluster's values, at least two clusters.
        sizes: (C,) number of each cluster's values.
        resamples: Number of resamples.
        seed: Seed of the resamples.
    """

    def mean(total: NDArray[np.float64], count: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        means: NDArray[np.float64] = total.sum(axis) / count.sum(axis)
        return means

    draws = stats.bootstrap(
        (sums, sizes),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2**22 // len(sums)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(draws.confidence_interval.low), float(draws.confidence_interval.high)
