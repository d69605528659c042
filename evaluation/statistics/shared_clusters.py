"""Covariance of the means of several seeds that share clusters, such as prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lpc_lightning.clustered_means import degrees_of_freedom, effective_number
from lpc_lightning.evaluation.statistics.seeds import MIN_EFFECTIVE, MIN_PROMPTS, NOTHING_SHARED, Shared


def shared_variance(seeds: Sequence[Mapping[str, float]], sizes: Mapping[str, float] | None = None) -> Shared:
    """Estimate the covariance between the means of two seeds whose clusters are partly or wholly the same.

    With c_sp from `deviations` for seed s and cluster p, S seeds, and P clusters in a seed, it is
    P / (P - 1) sum_p ((sum_s c_sp)^2 - sum_s c_sp^2) / (S (S - 1)). It is 0 if no cluster is shared, as when each seed
    has data of its own. If all seeds have the same clusters, it is the variance that the clusters add to the mean. It
    is None if a seed has fewer than `MIN_PROMPTS` clusters and shares one of them, or if a single cluster has most of
    the pairs (`MIN_EFFECTIVE`).

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
    shared_sizes = [1.0 if sizes is None else sizes[name] for name in shared]
    if effective_number(shared_sizes) < MIN_EFFECTIVE:
        return Shared(None, len(shared))
    added = np.array([[seed.get(name, 0.0) for name in shared] for seed in seeds])
    covariance = (np.square(added.sum(0)) - np.square(added).sum(0)).sum() / (count * (count - 1))
    variance = max(0.0, float(covariance)) * clusters / (clusters - 1)
    return Shared(variance, len(shared), freedom=degrees_of_freedom(shared_sizes))


def with_annotators(prompts: Shared, annotators: Shared, both: Shared) -> Shared:
    """Estimate the covariance if values are dependent within prompts and within annotators.

    It is the covariance over prompts, plus the one over annotators, minus the one over the pairs of a prompt and an
    annotator, which both of them contain; and at least the larger of the first two. The degrees of freedom are the
    smaller ones of the first two. If one of the three is unknown, as with few annotators, it is that over prompts.

    Source: Cameron, Gelbach and Miller 2011, "Robust inference with multiway clustering", on two-way clustering.

    Args:
        prompts: The covariance over prompts, from `shared_variance`.
        annotators: The same over annotators.
        both: The same over pairs of a prompt and an annotator.
    """
    if prompts.variance is None or annotators.variance is None or both.variance is None:
        return prompts
    total = prompts.variance + annotators.variance - both.variance
    return replace(
        prompts,
        variance=max(total, prompts.variance, annotators.variance),
        freedom=min((each.freedom for each in (prompts, annotators) if each.variance), default=0.0),
        annotators=annotators.prompts,
    )
