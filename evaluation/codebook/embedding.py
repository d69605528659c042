"""High-dimensional points on a plane, near ones near each other."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST = 5
"""Points below which a neighbourhood means nothing."""
ALIKE = 1e-6
"""Deviation of the points, in units of their norm, at which nothing is left but rounding."""


@dataclass(frozen=True)
class Embedding:
    """Where the points lie, or why they lie nowhere."""

    places: NDArray[np.float64] | None
    """(n, 2), without a unit."""
    method: str
    """`UMAP` or `t-SNE`; without places, a sentence."""


def embed(points: NDArray[np.float32], seed: int) -> Embedding:
    """Lay points (n, d) out by UMAP where the package `umap-learn` is installed, else by t-SNE (scikit-learn).

    Args:
        points: Any finite points; the scale does not matter.
        seed: The same seed gives the same picture. No global generator is touched.
    """
    method = "UMAP" if importlib.util.find_spec("umap") else "t-SNE"
    if len(points) < LEAST:
        return Embedding(None, f"{method} needs {LEAST} points or more, found {len(points)}.")
    centred = points - points.mean(0)
    deviation = float(np.sqrt(np.mean(centred.astype(np.float64) ** 2)))
    if deviation <= ALIKE * float(np.sqrt(np.mean(points.astype(np.float64) ** 2))):
        return Embedding(None, f"All {len(points)} points are alike: there is nothing to lay out.")
    lay_out = _umap if method == "UMAP" else _tsne
    return Embedding(lay_out(centred / deviation, seed % 2**32), method)


def _tsne(points: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    from sklearn.manifold import TSNE  # a second to import, for runs that draw

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


def _umap(points: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        # It tells that a part of it, which nobody asked for, needs Tensorflow; and that a seed takes one thread.
        warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
        warnings.filterwarnings("ignore", message="n_jobs value", category=UserWarning)
        from umap import UMAP

        return UMAP(n_neighbors=min(15, len(points) - 1), random_state=seed).fit_transform(points)
