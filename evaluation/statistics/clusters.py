"""Statistics of values that are dependent within clusters, such as several pairs of one prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

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
    """Compute the standard error of a mean over values that are dependent within clusters, by the jackknife.

    With d_c from `deviations`, and C clusters, it is sqrt(C / (C - 1) sum_c d_c^2). For clusters of one value this is
    the usual standard error. For clusters of equal size it is the standard error of the mean of their means.

    Source: MacKinnon, Nielsen and Webb 2023, "Cluster-robust inference: A guide to empirical practice", CV3.

    Args:
        values: (n,) values, at least one.
        clusters: (n,) the cluster of each value. None: all values are independent.

    Returns:
        The standard error, or None for a single cluster.
    """
    samples = np.asarray(values, dtype=float)
    added = _deviations(samples, range(len(samples)) if clusters is None else clusters)
    if len(added) < 2:
        return None
    return float((np.square(added).sum() * len(added) / (len(added) - 1)) ** 0.5)


def deviations(values: ArrayLike, clusters: ArrayLike) -> dict[str, float]:
    """Return what each cluster adds to a mean: (C - 1) / C (m - m_c), where m_c is the mean without the cluster.

    C is the number of clusters. For clusters of equal size it is the sum of a cluster's values minus the mean m,
    divided by the number of all values. A large cluster moves m towards itself, which that sum does not take into
    account.

    Args:
        values: (n,) values of one seed.
        clusters: (n,) the cluster of each value.
    """
    added = _deviations(np.asarray(values, dtype=float), clusters)
    return dict(zip(map(str, np.unique(np.asarray(clusters))), added.tolist(), strict=True))


def _deviations(samples: NDArray[np.float64], clusters: ArrayLike) -> NDArray[np.float64]:
    sums, sizes = cluster_sums(samples - samples.mean(), clusters)
    # A single cluster adds nothing.
    return sums / np.maximum(len(samples) - sizes, 1) * (len(sizes) - 1) / len(sizes)


def shares(clusters: ArrayLike) -> dict[str, float]:
    """Return the share of the values that each cluster has.

    Args:
        clusters: (n,) the cluster of each value.
    """
    names, sizes = np.unique(np.asarray(clusters), return_counts=True)
    return dict(zip(map(str, names), (sizes / sizes.sum()).tolist(), strict=True))


def degrees_of_freedom(sizes: Iterable[float]) -> float:
    """Return the degrees of freedom of a variance over clusters: their effective number minus 1, and at least 1.

    The effective number is (sum_c n_c)^2 / sum_c n_c^2. It is the number of clusters if their sizes n_c are equal.

    Source: Kish 1965, "Survey Sampling", section 11.7.

    Args:
        sizes: Size of each cluster, or its share. At least one is positive.
    """
    values = np.array(list(sizes))
    return max(1.0, float(values.sum() ** 2 / np.square(values).sum()) - 1)


def shared_variance(seeds: Sequence[Mapping[str, float]], sizes: Mapping[str, float] | None = None) -> Shared:
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
        sizes: Size of each cluster, or its share. None: their sizes are equal.
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
    freedom = degrees_of_freedom(1.0 if sizes is None else sizes[name] for name in shared)
    return Shared(max(0.0, float(covariance)) * clusters / (clusters - 1), len(shared), freedom=freedom)
