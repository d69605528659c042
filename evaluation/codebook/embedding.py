"""Two-dimensional layouts of high-dimensional points that keep neighbours together."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_POINTS = 5
"""Minimum number of points. Fewer points have no meaningful neighbourhoods."""
MIN_RELATIVE_DEVIATION = 1e-6
"""Minimum deviation of the points, relative to their norm. A smaller deviation is rounding error."""


@dataclass(frozen=True)
class Embedding:
    """The coordinates of the points, or the reason why there are none."""

    coordinates: NDArray[np.float64] | None
    """(n, 2) coordinates, without a unit."""
    method: str
    """`UMAP` or `t-SNE`. If `coordinates` is None, a sentence with the reason."""


def embed(points: NDArray[np.float32], seed: int) -> Embedding:
    """Embed points (n, d) in a plane: by UMAP if the package `umap-learn` is installed, else by scikit-learn's t-SNE.

    Args:
        points: (n, d) finite points, at any scale.
        seed: Seed of the layout. The same seed gives the same layout. Global random states are not changed.
    """
    method = "UMAP" if importlib.util.find_spec("umap") else "t-SNE"
    if len(points) < MIN_POINTS:
        return Embedding(None, f"{method} needs {MIN_POINTS} points or more, found {len(points)}.")
    centred = points - points.mean(0)
    deviation = float(np.sqrt(np.mean(centred.astype(np.float64) ** 2)))
    if deviation <= MIN_RELATIVE_DEVIATION * float(np.sqrt(np.mean(points.astype(np.float64) ** 2))):
        return Embedding(None, f"All {len(points)} points are equal: there is no layout to show.")
    embed_points = _umap if method == "UMAP" else _tsne
    return Embedding(embed_points(centred / deviation, seed % 2**32), method)


def _tsne(points: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE  # imported here: the import takes a second, and most runs draw no plots

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


def _umap(points: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        # UMAP warns about an unused part that needs TensorFlow, and about a seed limiting it to one thread.
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        warnings.filterwarnings("ignore", message="n_jobs value", category=UserWarning)
        from umap import UMAP

        return UMAP(n_neighbors=min(15, len(points) - 1), random_state=seed).fit_transform(points)
