"""Codes of annotators whose wishes are not known, by expectation maximization. All pairs of an annotator share a code.

The expectation step needs the likelihood of an annotator's labels under each code. A code that has been fitted to these
labels makes them too likely, and no annotator would change codes. So each annotator's labels are predicted by codes
that are fitted without them, which ridge regression has in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_expit, logsumexp
from sklearn.cluster import KMeans

from benchmarks.code_finding.pairs import Floats
from benchmarks.code_finding.ridge import best_scale, folds_of

COMPONENTS = 64
"""Number of principal components that groups are found in."""
STEPS = 15
"""Steps of expectation maximization."""
RESTARTS = 2
"""Starts, of which the one with the largest evidence is kept."""
PENALTIES = (10.0, 30.0, 100.0, 300.0)
"""Candidate penalties. One is chosen by the evidence of held-out prompts."""
HELD_OUT = 5
"""One in so many prompts is held out for this choice."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """K codes and the annotators' weights over them."""

    weights: Floats
    """(A, K) posterior weights of each annotator's codes."""
    log_prior: Floats
    """(K,) log shares of the codes."""
    codes: Floats
    """(r, K) codes."""
    scale: float
    """Factor from a prediction to a log-odds."""
    evidence: float
    """Log-likelihood of all labels, each annotator's under codes that are fitted without them, in nats."""


def cluster_annotators(rows: Floats, annotators: NDArray[np.intp], count: int, rng: np.random.Generator) -> Floats:
    """Cluster the directions of the annotators' mean rows by k-means.

    Args:
        rows: (N, r) rows.
        annotators: (N,) numbers of the annotators, from 0 without gaps.
        count: Number of clusters K.
        rng: Source of the first centres.

    Returns:
        (A, K) 1 for the annotator's cluster, otherwise 0.
    """
    sums = np.zeros((annotators.max() + 1, rows.shape[1]))
    np.add.at(sums, annotators, rows)
    directions = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    labels = KMeans(count, n_init=1, random_state=int(rng.integers(2**31))).fit(directions).labels_
    return np.eye(count)[labels]


def fit_mixture(
    rows: Floats,
    annotators: NDArray[np.intp],
    count: int,
    penalty: float,
    rng: np.random.Generator,
    restarts: int = RESTARTS,
) -> Mixture:
    """Fit a mixture from several starts and return the one with the largest evidence. See `cluster_annotators`."""
    starts = [cluster_annotators(rows, annotators, count, rng) for _ in range(restarts)]
    fits = [maximize(rows, annotators, start, penalty) for start in starts]
    return max(fits, key=lambda mixture: mixture.evidence)


def maximize(rows: Floats, annotators: NDArray[np.intp], start: Floats, penalty: float) -> Mixture:
    """Run expectation maximization from (A, K) weights."""
    weights = start
    blocks = _blocks(annotators)
    for _ in range(STEPS):
        codes, predictions = _leave_annotators_out(rows, weights[annotators], blocks, penalty)
        scale = best_scale(predictions, weights[annotators])
        log_prior = np.log((weights.sum(0) + 1) / (len(weights) + weights.shape[1]))
        log_joint = log_prior + np.zeros_like(weights)
        np.add.at(log_joint, annotators, log_expit(scale * predictions))
        evidence = logsumexp(log_joint, axis=1)
        weights = np.exp(log_joint - evidence[:, None])
    return Mixture(weights, log_prior, codes, scale, float(evidence.sum()))


def choose_penalty(
    rows: Floats, annotators: NDArray[np.intp], prompts: NDArray, count: int, rng: np.random.Generator
) -> float:
    """Return the penalty under which the labels of held-out prompts are likeliest, given the annotators' others.

    Args:
        rows: (N, r) rows.
        annotators: (N,) numbers of the annotators.
        prompts: (N,) prompts.
        count: Number of codes.
        rng: Source of the held-out prompts and of the starts.
    """
    held = folds_of(prompts, rng, HELD_OUT) == 0
    fitted, numbers = np.unique(annotators[~held], return_inverse=True)
    row_of = np.full(annotators.max() + 1, -1)
    row_of[fitted] = np.arange(len(fitted))
    owners = row_of[annotators[held]]
    scores = []
    for penalty in PENALTIES:
        mixture = fit_mixture(rows[~held], numbers, count, penalty, rng, restarts=1)
        prior = np.where(owners[:, None] >= 0, np.log(mixture.weights[owners].clip(1e-12)), mixture.log_prior)
        likelihoods = log_expit(mixture.scale * (rows[held] @ mixture.codes))
        scores.append(float(logsumexp(prior + likelihoods, axis=1).sum()))
    return PENALTIES[int(np.argmax(scores))]


def _blocks(annotators: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Return (a, n) indices of the pairs of annotators with n pairs each, for every n."""
    order = np.argsort(annotators, kind="stable")
    ends = np.cumsum(np.bincount(annotators))
    members = np.split(order, ends[:-1])
    sizes = sorted({len(own) for own in members} - {0})
    return [np.stack([own for own in members if len(own) == size]) for size in sizes]


def _leave_annotators_out(
    rows: Floats, weights: Floats, blocks: list[NDArray[np.intp]], penalty: float
) -> tuple[Floats, Floats]:
    """Fit the codes, and predict each annotator's labels by codes that are fitted without them.

    With A = X' W X + penalty I, S = X_a A^-1 X_a' and the annotator's weight w, the residuals without the annotator are
    (I - w S)^-1 times the residuals with them.

    Args:
        rows: (N, r) rows.
        weights: (N, K) weights of the pairs, the same for all pairs of an annotator.
        blocks: See `_blocks`.
        penalty: The penalty.

    Returns:
        (r, K) codes and (N, K) predictions.
    """
    codes, predictions = np.zeros((rows.shape[1], weights.shape[1])), np.zeros_like(weights)
    for code in range(weights.shape[1]):
        own = weights[:, code]
        inverse = np.linalg.inv(rows.T @ (rows * own[:, None]) + penalty * np.eye(rows.shape[1]))
        codes[:, code] = inverse @ (rows.T @ own)
        spread, residuals = rows @ inverse, 1 - rows @ codes[:, code]
        for block in blocks:
            products = spread[block] @ rows[block].transpose(0, 2, 1)
            system = np.eye(block.shape[1]) - own[block[:, 0], None, None] * products
            predictions[block, code] = 1 - np.linalg.solve(system, residuals[block][..., None])[..., 0]
    return codes, predictions
