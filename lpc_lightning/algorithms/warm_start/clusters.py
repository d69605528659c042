"""Kinds of pairs: what the prompt or the annotator lets expect of a pair's pull, clustered.

One pull is mostly noise, the words that two answers happen to differ in. What remains of it given the prompt (or the
annotator) is the preference. Of the prompt, that counts which has to do with what is answered, and that can be told
without a label.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.linear_model import RidgeCV
from torch import Tensor

FEW = 0.1
"""Mean variances added to every direction's before features are brought to equal variance: next to nothing."""
MANY = 10.0
"""The same for z_gradients: of the directions in which words differ most, a few have more than this and are made
smaller."""
ALPHAS = tuple(10.0 ** (power / 2) for power in range(-4, 11))
"""Weights of the ridge that are tried, by leaving one pair out."""
AT_ONCE = 4096
"""Pairs whose distances are looked at all with all."""


def prompt_canonical_variates(prompts: Tensor, said: Tensor) -> Tensor:
    """What prompts are about: their canonical variates with what is said to them, each times its correlation squared.

    Args:
        prompts: (N, d) states.
        said: (N, m) about both answers, whichever won: flipped labels do not change it.

    Returns:
        (N, d) or (N, m), whichever is less wide.
    """
    first, second = (whitened(values - values.mean(0), FEW) for values in (prompts, said))
    axes, correlations, _ = torch.linalg.svd(first.T @ second / len(first), full_matrices=False)
    return first @ axes * correlations.square()


def cluster_pairs(known: Tensor, z_gradients: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster pairs by the direction of the pull that is to be expected of them.

    Pulls are regressed on what is known (ridge), Ward's clusters of the predicted directions are refined by k-means.

    Args:
        known: (N, m) beside the label.
        z_gradients: (n, d) of the first n pairs. Of the others it is not seen: they get the kind nearest to what is
            expected.
        clusters: K, at most n.

    Returns:
        (K, d) codes, of a common scale that means nothing, and (N,) the kind of each pair. A pull times a code is the
        product of the whitened pull with the mean that is expected in that kind. A kind without a pair, where there
        are fewer different pairs than clusters, has code 0.
    """
    equal = whitener(z_gradients, MANY)
    ridge = RidgeCV(ALPHAS).fit(known[: len(z_gradients)].numpy(), (z_gradients @ equal).numpy())
    expected = ridge.predict(known.numpy())
    directions = expected / np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-12)
    found = directions[: min(AT_ONCE, len(z_gradients))]
    different = len(np.unique(found.round(6), axis=0))
    parts = AgglomerativeClustering(min(clusters, different)).fit(found).labels_
    centres = np.stack([found[parts == part].mean(0) for part in range(parts.max() + 1)])
    cluster_of = KMeans(len(centres), init=centres, n_init=1).fit(directions[: len(z_gradients)]).predict(directions)
    means = np.zeros((clusters, z_gradients.shape[1]), expected.dtype)
    for kind in np.unique(cluster_of[: len(z_gradients)]):
        means[kind] = expected[: len(z_gradients)][cluster_of[: len(z_gradients)] == kind].mean(0)
    return torch.from_numpy(means).to(z_gradients.dtype) @ equal, torch.from_numpy(cluster_of).long()


def whitener(values: Tensor, shrinkage: float) -> Tensor:
    """(d, d) matrix that brings all directions of `values` (N, d) to a mean square of 1, or below: see `shrinkage`."""
    squares, axes = torch.linalg.eigh((values.T @ values / len(values)).double())
    scale = (squares + shrinkage * squares.mean()).rsqrt()
    return (axes @ torch.diag(scale) @ axes.T).to(values.dtype)


def whitened(values: Tensor, shrinkage: float) -> Tensor:
    """`values` (N, d) by their `whitener`."""
    return values @ whitener(values, shrinkage)
