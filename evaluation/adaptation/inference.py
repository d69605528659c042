"""Infer weights over the codes from n labelled pairs of an annotator, and predict the annotator's other labels.

All computations use tables of pairs by codes. Notation: p is the prior. l_k is a pair's loss under code k, and l'_k is
the loss of the same pair with the label swapped. S is the set of n labelled pairs.

- `exact`: p(k given x, S) is proportional to p_k(x) times the likelihood, the product over S of exp(-l_k).
- `amortised`: the average over S of q(k given pair), where q is the learned posterior. If S is empty, the prior.
- The prediction under weights w: log sum_k w_k exp(-l_k) - log sum_k w_k exp(-l'_k). It is correct if it is positive.

For DPO, exp(-l_k) is the probability of the label under code k. Then `exact` is Bayes' rule, and the prediction is the
log-odds of the label. This is the mixture of the predictions under each code. It differs from the prediction under the
mixture z = sum_k w_k e_k, which needs another forward pass: see `PolicyUnderMixtures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, logsumexp

Table = NDArray[np.float64]


@dataclass(frozen=True)
class CodeTables:
    """Prior, losses and posterior of n pairs under each of K codes."""

    log_prior: Table
    """(n, K) log p_k(x)."""
    losses: Table
    """(n, K) l_k of the pair as labelled: minus `PairLosses.label_log_likelihood`, in nats."""
    swapped: Table
    """(n, K) l_k of the pair with the label swapped."""
    log_posterior: Table | None = None
    """(n, K) log q_k of the learned posterior. None: no posterior is learned."""

    def take(self, rows: NDArray[np.int64]) -> CodeTables:
        """Select pairs by an index array of any shape (...). The result has tables (..., K)."""
        posterior = None if self.log_posterior is None else self.log_posterior[rows]
        return CodeTables(self.log_prior[rows], self.losses[rows], self.swapped[rows], posterior)


def single_code(margins: Table) -> CodeTables:
    """Describe a policy without codes as a policy with one code.

    Args:
        margins: (n,) margins of the pairs as labelled. Only the difference of the two losses matters.
    """
    zeros = np.zeros((len(margins), 1))
    return CodeTables(zeros, zeros, margins[:, None])


@dataclass(frozen=True)
class Inference:
    """A rule that turns labelled pairs into weights over the codes."""

    contributions: Callable[[CodeTables], Table | None]
    """Returns (n, K) the contribution of each labelled pair, in logs. None: the latent space has no such quantity."""
    combine: np.ufunc
    """Combines the contributions of several pairs."""
    log_weights: Callable[[Table, Table], Table]
    """Takes (m, K) the log prior of the new pairs and (m, K) the combined contributions. Returns (m, K) log weights up
    to a constant of each row."""


INFERENCES: Mapping[str, Inference] = {
    "exact": Inference(lambda tables: -tables.losses, np.add, lambda prior, likelihood: prior + likelihood),
    "amortised": Inference(lambda tables: tables.log_posterior, np.logaddexp, lambda prior, mean: mean),
}


def log_weights_by_shots(
    inference: Inference, log_prior: Table, contributions: Table, shots: Sequence[int]
) -> Iterator[tuple[int, Table]]:
    """Infer log weights for each pair of a circular order from the n pairs that follow it.

    Args:
        inference: The rule.
        log_prior: (..., m, K) log prior of the pairs, in circular order.
        contributions: (..., m, K) `inference.contributions` of the same pairs.
        shots: Values of n, in rising order and below m.

    Yields:
        n and (..., m, K) log weights, up to a constant of each row.
    """
    combined: Table | None = None
    used = 0
    for n in shots:
        while used < n:
            used += 1
            following = np.roll(contributions, -used, axis=-2)
            combined = following if combined is None else inference.combine(combined, following)
        yield n, log_prior if combined is None else inference.log_weights(log_prior, combined)


def margins(log_weights: Table, tables: CodeTables) -> Table:
    """Compute (...) log sum_k w_k exp(-l_k) - log sum_k w_k exp(-l'_k).

    Args:
        log_weights: (..., K) log weights, up to a constant of each row.
        tables: Tables (..., K) of the same pairs.
    """
    labelled, swapped = (logsumexp(log_weights - losses, axis=-1) for losses in (tables.losses, tables.swapped))
    difference: Table = labelled - swapped
    return difference


def correct(margins: Table) -> Table:
    """Return 1 for a positive margin, 0 for a negative one, and 1/2 for a tie.

    This is the definition of `lpc_lightning.algorithms.metrics.accuracies`.
    """
    return (np.sign(margins) + 1) / 2


def code_weights(tables: CodeTables, annotators: Sequence[str]) -> dict[str, Table]:
    """Compute (K,) weights over the codes for each annotator from all pairs of that annotator.

    The weights are the mean prior times the likelihood of the labels, normalised.

    Args:
        tables: Tables of n pairs.
        annotators: (n,) the annotator of each pair.
    """
    names = np.asarray(annotators)
    weights = {}
    for name in np.unique(names):
        members = names == name
        mean_prior = logsumexp(tables.log_prior[members], axis=0) - np.log(members.sum())
        weights[str(name)] = np.exp(log_softmax(mean_prior - tables.losses[members].sum(0)))
    return weights
