"""Clusters of pairs by the gradient that the prompt or the annotator predicts.

A pair's z-gradient is the gradient of log pi(y_w|x, z) - log pi(y_l|x, z) with respect to z. A single one is mostly
noise, because two answers differ in many words by chance. Its expectation given the prompt (or the annotator) is the
preference. Only those features of the prompt are used that are related to the answers. They are found without labels.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.linear_model import RidgeCV
from torch import Tensor

STATE_SHRINKAGE = 0.1
"""Shrinkage of the whitening of prompt states and answer gradients, in mean variances (see `whitener`). Almost none."""
GRADIENT_SHRINKAGE = 10.0
"""The same for the z-gradients of pairs. Only the few directions in which words differ most have a larger variance, and
only these are scaled down."""
ALPHAS = tuple(10.0 ** (power / 2) for power in range(-4, 11))
"""Candidate weights of the ridge penalty. One is chosen by leave-one-out error."""
MAX_WARD_PAIRS = 4096
"""Largest number of pairs in Ward's clustering, which computes all distances between pairs."""


def prompt_canonical_variates(prompts: Tensor, answers: Tensor) -> Tensor:
    """Compute the canonical variates of prompts with their answers, each times its squared correlation.

    Args:
        prompts: (N, d) states.
        answers: (N, m) features of both answers together. They must not depend on the label.

    Returns:
        (N, d) or (N, m), whichever is narrower.
    """
    first, second = (whitened(values - values.mean(0), STATE_SHRINKAGE) for values in (prompts, answers))
    axes, correlations, _ = torch.linalg.svd(first.T @ second / len(first), full_matrices=False)
    return first @ axes * correlations.square()


def cluster_pairs(features: Tensor, z_gradients: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster pairs by the direction of their predicted gradient.

    The gradients are regressed on the features (ridge). Ward's clusters of the predicted directions are refined by
    k-means.

    Args:
        features: (N, m) features of the pairs that do not depend on the label.
        z_gradients: (n, d) gradients of the first n pairs. The other pairs get the cluster that is nearest to their
            predicted direction.
        clusters: Number of clusters K, at most n.

    Returns:
        (K, d) codes and (N,) the cluster of each pair. The codes have a common scale without meaning. A gradient times
        a code is the product of the whitened gradient with the cluster's mean predicted gradient. If fewer than K pairs
        are distinct, some clusters have no pair, and their code is 0.
    """
    whitening = whitener(z_gradients, GRADIENT_SHRINKAGE)
    fitted = len(z_gradients)
    ridge = RidgeCV(ALPHAS).fit(features[:fitted].numpy(), (z_gradients @ whitening).numpy())
    predicted = ridge.predict(features.numpy())
    directions = predicted / np.maximum(np.linalg.norm(predicted, axis=1, keepdims=True), 1e-12)
    sample = directions[: min(MAX_WARD_PAIRS, fitted)]
    distinct = len(np.unique(sample.round(6), axis=0))
    parts = AgglomerativeClustering(min(clusters, distinct)).fit(sample).labels_
    centres = np.stack([sample[parts == part].mean(0) for part in range(parts.max() + 1)])
    cluster_of = KMeans(len(centres), init=centres, n_init=1).fit(directions[:fitted]).predict(directions)
    means = np.zeros((clusters, z_gradients.shape[1]), predicted.dtype)
    for cluster in np.unique(cluster_of[:fitted]):
        means[cluster] = predicted[:fitted][cluster_of[:fitted] == cluster].mean(0)
    return torch.from_numpy(means).to(z_gradients.dtype) @ whitening, torch.from_numpy(cluster_of).long()


def whitener(values: Tensor, shrinkage: float) -> Tensor:
    """Compute the (d, d) matrix that scales all directions of `values` (N, d) to a mean square of at most 1.

    `shrinkage` times the mean variance is added to the variance of every direction before its scale is computed. The
    matrix is finite if all values are 0, such as the centred states of a single prompt.
    """
    squares, axes = torch.linalg.eigh((values.T @ values / len(values)).double())
    scale = (squares + shrinkage * squares.mean()).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
    return (axes @ torch.diag(scale) @ axes.T).to(values.dtype)


def whitened(values: Tensor, shrinkage: float) -> Tensor:
    """Multiply `values` (N, d) by their `whitener`."""
    return values @ whitener(values, shrinkage)
