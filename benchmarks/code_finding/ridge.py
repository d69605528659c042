"""Ridge regression of labels on differences between answers, with a penalty chosen by cross-validation over prompts.

A row x of a pair is chosen minus rejected, so that the target of every row is 1, and x with the opposite label is -x.
There is no intercept, because it would be the bias of the order in which two answers stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_expit

from benchmarks.code_finding.pairs import Floats

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-4, 11))
"""Candidate penalties. Rows are scaled to a mean square of 1 of their entries."""
SCALES = np.geomspace(0.1, 100.0, 31)
"""Candidate factors beta from a prediction to a log-odds."""
FOLDS = 5
"""Folds of the prompts."""
COMPONENTS = 192
"""Number of principal components of the training rows that regressions read."""


@dataclass(frozen=True, slots=True)
class Components:
    """Leading principal components of rows about 0, scaled so that the mean square of an entry of the rows is 1."""

    axes: Floats
    """(d, r) orthogonal columns times the scale."""

    @classmethod
    def fit(cls, rows: Floats, count: int = COMPONENTS) -> Components:
        """Fit `count` components, or as many as there are dimensions, to (N, d) rows."""
        squares = rows.astype(float).T @ rows.astype(float)
        axes = np.linalg.eigh(squares)[1][:, ::-1][:, :count]
        return cls(axes / max(np.sqrt(np.trace(squares) / rows.size), 1e-12))

    def __call__(self, rows: Floats) -> Floats:
        """Return (N, r) components of (N, d) rows."""
        components: Floats = rows @ self.axes
        return components


@dataclass(frozen=True, slots=True)
class Codes:
    """K directions, and the factor from a prediction to a log-odds."""

    weights: Floats
    """(r, K) a row times a column is the prediction under a code. It is 1 if the label is certain."""
    scale: float
    """Factor beta."""
    penalty: float
    """Penalty that was chosen."""

    def log_likelihoods(self, rows: Floats) -> Floats:
        """Return (N, K) log-probabilities of the labels under each code."""
        values: Floats = log_expit(self.scale * (rows @ self.weights))
        return values


def solve_path(rows: Floats, weights: Floats, penalties: tuple[float, ...] = PENALTIES) -> Floats:
    """Minimize sum_i w_i (1 - x_i v)^2 + penalty |v|^2 for each penalty.

    Args:
        rows: (N, r) rows x.
        weights: (N,) weights w, at least 0.
        penalties: (P,) penalties, above 0.

    Returns:
        (r, P) solutions v.
    """
    if len(rows) < rows.shape[1]:  # the dual problem is smaller
        roots = np.sqrt(weights)
        scaled = rows * roots[:, None]
        squares, axes = np.linalg.eigh(scaled @ scaled.T)
        projected = axes.T @ roots
        duals = axes @ (projected[:, None] / (squares.clip(0)[:, None] + np.array(penalties)))
        path: Floats = scaled.T @ duals
        return path
    squares, axes = np.linalg.eigh(rows.T @ (rows * weights[:, None]))
    projected = axes.T @ (rows.T @ weights)
    path = axes @ (projected[:, None] / (squares.clip(0)[:, None] + np.array(penalties)))
    return path


def folds_of(prompts: NDArray, rng: np.random.Generator, count: int = FOLDS) -> NDArray[np.intp]:
    """Return (N,) folds of pairs. All pairs of a prompt are in one fold."""
    names, owner = np.unique(prompts, return_inverse=True)
    folds: NDArray[np.intp] = (rng.permutation(len(names)) % count)[owner]
    return folds


def held_out_predictions(rows: Floats, weights: Floats, folds: NDArray[np.intp]) -> Floats:
    """Predict each pair by codes that are fitted to the other folds.

    Args:
        rows: (N, r) rows.
        weights: (N, K) weight of each pair in each code.
        folds: (N,) folds.

    Returns:
        (N, K, P) predictions for each code and each of `PENALTIES`.
    """
    predictions = np.zeros((*weights.shape, len(PENALTIES)))
    for fold in np.unique(folds):
        held = folds == fold
        for code in range(weights.shape[1]):
            predictions[held, code] = rows[held] @ solve_path(rows[~held], weights[~held, code])
    return predictions


def fit_codes(rows: Floats, weights: Floats, prompts: NDArray, rng: np.random.Generator) -> Codes:
    """Fit a code to each column of weights. All codes have the same penalty and scale.

    The penalty has the smallest squared error of held-out prompts, and the scale their largest likelihood.

    Args:
        rows: (N, r) rows.
        weights: (N, K) weight of each pair in each code.
        prompts: (N,) prompts.
        rng: Source of the folds.
    """
    predictions = held_out_predictions(rows, weights, folds_of(prompts, rng))
    errors = np.einsum("nk,nkp->p", weights, np.square(1 - predictions))
    best = int(errors.argmin())
    chosen = PENALTIES[best]
    scale = best_scale(predictions[:, :, best], weights)
    fitted = [solve_path(rows, weights[:, code], (chosen,))[:, 0] for code in range(weights.shape[1])]
    return Codes(np.stack(fitted, axis=1), scale, chosen)


def best_scale(predictions: Floats, weights: Floats) -> float:
    """Return the scale of `SCALES` under which (N, K) predictions with these weights are likeliest."""
    likelihoods = [float((weights * log_expit(scale * predictions)).sum()) for scale in SCALES]
    return float(SCALES[int(np.argmax(likelihoods))])
