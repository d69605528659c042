"""Means over values that are dependent within clusters, such as several pairs of one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
    variance = _variance(_deviations(samples, range(len(samples)) if clusters is None else clusters))
    return None if variance is None else variance**0.5


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


def _variance(added: NDArray[np.float64]) -> float | None:
    """Compute the variance of a mean from the deviations of its clusters. None for a single cluster."""
    return float(np.square(added).sum() * len(added) / (len(added) - 1)) if len(added) > 1 else None


def shares(clusters: ArrayLike) -> dict[str, float]:
    """Return the share of the values that each cluster has.

    Args:
        clusters: (n,) the cluster of each value.
    """
    names, sizes = np.unique(np.asarray(clusters), return_counts=True)
    return dict(zip(map(str, names), (sizes / sizes.sum()).tolist(), strict=True))


class ClusterScores(NamedTuple):
    """What the clusters of some values add to the mean of the values."""

    deviations: Mapping[str, float]
    """See `deviations`, by the name of the cluster."""
    shares: Mapping[str, float]
    """See `shares`."""

    @property
    def variance(self) -> float | None:
        """Square of `standard_error`. None for a single cluster."""
        return _variance(np.array(list(self.deviations.values())))

    def minus(self, other: ClusterScores) -> ClusterScores:
        """Return what each cluster adds to the difference of two means. A cluster of one of them adds its part."""
        # In the order of the files, so that sums over clusters round alike in every process.
        names = dict.fromkeys([*self.deviations, *other.deviations])
        added = {name: self.deviations.get(name, 0.0) - other.deviations.get(name, 0.0) for name in names}
        return ClusterScores(added, {**other.shares, **self.shares})


def cluster_scores(values: ArrayLike, clusters: ArrayLike) -> ClusterScores:
    """Return what each cluster adds to a mean, and its share of the values.

    Args:
        values: (n,) values of one seed.
        clusters: (n,) the cluster of each value.
    """
    return ClusterScores(deviations(values, clusters), shares(clusters))


def effective_number(sizes: Iterable[float]) -> float:
    """Return the effective number of clusters, (sum_c n_c)^2 / sum_c n_c^2: their number if all sizes n_c are equal.

    Source: Kish 1965, "Survey Sampling", section 11.7.

    Args:
        sizes: Size of each cluster, or its share. At least one is positive.
    """
    values = np.array(list(sizes))
    return float(values.sum() ** 2 / np.square(values).sum())


def degrees_of_freedom(sizes: Iterable[float]) -> float:
    """Return the degrees of freedom of a variance over clusters: their effective number minus 1, and at least 1.

    Args:
        sizes: Size of each cluster, or its share. At least one is positive.
    """
    return max(1.0, effective_number(sizes) - 1)
