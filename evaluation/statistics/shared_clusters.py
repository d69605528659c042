"""Covariance of the means of several seeds that share clusters, such as prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lpc_lightning.clustered_means import degrees_of_freedom
from lpc_lightning.evaluation.statistics.seeds import MIN_PROMPTS, NOTHING_SHARED, Shared


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
