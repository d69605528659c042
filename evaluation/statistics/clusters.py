"""Statistics of values that are dependent within clusters, such as several pairs of one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lpc_lightning.evaluation.statistics.seeds import MIN_PROMPTS, NOTHING_SHARED, Shared


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


def deviations(values: ArrayLike, clusters: ArrayLike) -> dict[str, float]:
    """Return what each cluster adds to a mean: the sum of its values minus the mean, divided by the number of values.

    Args:
        values: (n,) values of one seed.
        clusters: (n,) the cluster of each value.
    """
    samples, names = np.asarray(values, dtype=float), np.unique(np.asarray(clusters))
    sums, _ = cluster_sums((samples - samples.mean()) / len(samples), clusters)
    return dict(zip(map(str, names), sums.tolist(), strict=True))


def shared_variance(seeds: Sequence[Mapping[str, float]]) -> Shared:
    """Estimate the covariance between the means of two seeds whose clusters are partly or wholly the same.

    With c_sp from `deviations` for seed s and cluster p, S seeds, and P clusters in a seed, it is
    P / (P - 1) sum_p ((sum_s c_sp)^2 - sum_s c_sp^2) / (S (S - 1)). It is 0 if no cluster is shared, as when each seed
    has data of its own. If all seeds have the same clusters, it is the variance that the clusters add to the mean. It
    is None if a seed has fewer than `MIN_PROMPTS` clusters and shares one of them.

    This is the closed form of resampling seeds, and whole prompts within them. With few seeds, percentiles of such
    resamples are too narrow; Student's quantile with the variance is not (see `estimate`).

    Source: Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering".

    Args:
        seeds: What each cluster adds to the mean of each seed, by the name of the cluster.
    """
    count = len(seeds)
    names = Counter(name for seed in seeds for name in seed)
    shared = [name for name, number in names.items() if number > 1]
    clusters = min((len(seed) for seed in seeds if not seed.keys().isdisjoint(shared)), default=0)
    if 0 < clusters < MIN_PROMPTS:
        return Shared(None, min(clusters, len(shared)))
    # A single one of many clusters adds little, and its variance has no degree of freedom.
    if len(shared) < 2:
        return NOTHING_SHARED
    added = np.array([[seed.get(name, 0.0) for name in shared] for seed in seeds])
    covariance = (np.square(added.sum(0)) - np.square(added).sum(0)).sum() / (count * (count - 1))
    return Shared(max(0.0, float(covariance)) * clusters / (clusters - 1), len(shared))
