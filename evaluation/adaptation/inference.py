"""Infer weights over the codes from n labelled pairs of an annotator, and predict the annotator's other labels.

Computations use tables of pairs by codes. Notation: p is the prior. l_k is a pair's loss under code k, and l'_k is
the loss of the same pair with the label swapped. S is the set of n labelled pairs. With a robust loss, L_k is the
likelihood of a label that may be wrong, and l_k is the algorithm's loss. Without one, L_k = exp(-l_k).

- `exact`: p(k given x, S) is proportional to p_k(x) times the likelihood, the product over S of L_k.
- `amortized`: the average over S of q(k given pair), where q is the learned posterior. If S is empty, the prior.
- The prediction under weights w: log sum_k w_k exp(-l_k) - log sum_k w_k exp(-l'_k). It is correct if it is positive.

For DPO, exp(-l_k) is the probability of the label under code k. Then `exact` is Bayes' rule, and the prediction is the
log-odds of the label. This is the mixture of the predictions under each code. It differs from the prediction under the
mixture z = sum_k w_k e_k, which needs another forward pass: see `PolicyUnderMixtures`.

A Gaussian latent has no distribution over codes, and no prediction without that pass. Its weights c (`amortized`) are
the mean over S of the posterior's means. If S is empty, they are the prior's mean.

`own_majority` uses labels alone, for pairs that all have the same two answers: the answer that was chosen more often in
S. A tie is half right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

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
    """(n, K) l_k of the pair as labelled: minus `PairLosses.label_log_likelihood` without label noise, in nats."""
    swapped: Table
    """(n, K) l_k of the pair with the label swapped."""
    log_posterior: Table | None = None
    """(n, K) log q_k of the learned posterior. None: no posterior is learned."""
    evidence: Table | None = None
    """(n, K) log L_k of labels that may be wrong. None: -l_k."""
    prior_means: Table | None = None
    """(n, K) mean of a Gaussian prior. None: the latent is not Gaussian."""
    posterior_means: Table | None = None
    """(n, K) mean of a Gaussian posterior."""
    signs: Table | None = None
    """(n, 1) which of two answers was chosen, 1 or -1. None: the pairs do not all have the same two answers."""

    @property
    def log_likelihoods(self) -> Table:
        """(n, K) log L_k, by which labels favour codes."""
        return -self.losses if self.evidence is None else self.evidence

    def take(self, rows: NDArray[np.int64]) -> CodeTables:
        """Select pairs by an index array of any shape (...). The result has tables (..., K)."""
        given = {each.name: table for each in fields(self) if (table := getattr(self, each.name)) is not None}
        return CodeTables(**{name: table[rows] for name, table in given.items()})


def single_code(margins: Table) -> CodeTables:
    """Describe a policy without codes as a policy with one code.

    Args:
        margins: (n,) margins of the pairs as labelled. Only the difference of the two losses matters.
    """
    zeros = np.zeros((len(margins), 1))
    return CodeTables(zeros, zeros, margins[:, None])


def margins(log_weights: Table, tables: CodeTables) -> Table:
    """Compute (...) log sum_k w_k exp(-l_k) - log sum_k w_k exp(-l'_k).

    Args:
        log_weights: (..., K) log weights, up to a constant of each row.
        tables: Tables (..., K) of the same pairs.
    """
    labelled, swapped = (logsumexp(log_weights - losses, axis=-1) for losses in (tables.losses, tables.swapped))
    difference: Table = labelled - swapped
    return difference


def softmax_weights(log_weights: Table, n: int) -> Table:
    """Normalize log weights over the codes."""
    weights: Table = np.exp(log_softmax(log_weights, axis=-1))
    return weights


@dataclass(frozen=True)
class Inference:
    """A rule that turns labelled pairs into weights over the codes, and predicts labels from the weights."""

    contributions: Callable[[CodeTables], Table | None]
    """Returns (n, K) the contribution of each labelled pair, in logs. None: the latent space has no such quantity."""
    combine: np.ufunc
    """Combines the contributions of several pairs."""
    log_weights: Callable[[Table, Table], Table]
    """Takes (m, K) the prior of the new pairs and (m, K) the combined contributions. Returns (m, K) log weights up to a
    constant of each row."""
    prior: Callable[[CodeTables], Any] = lambda tables: tables.log_prior
    """Returns (n, K) the weights without labelled pairs."""
    margins: Callable[[Table, CodeTables], Table] | None = margins
    """Takes (..., K) weights and the tables of the same pairs. Returns (...) margins of the predictions. None: only the
    policy under the mixture can predict."""
    mixture: Callable[[Table, int], Table] | None = softmax_weights
    """Takes (..., K) weights and the number of labelled pairs. Returns (..., K) weights w of z = sum_k w_k e_k. None:
    the rule does not use the policy."""


INFERENCES: Mapping[str, Inference] = {
    "exact": Inference(lambda tables: tables.log_likelihoods, np.add, lambda prior, likelihood: prior + likelihood),
    "amortized": Inference(lambda tables: tables.log_posterior, np.logaddexp, lambda prior, mean: mean),
}
"""Rules for a distribution over codes."""
GAUSSIAN: Mapping[str, Inference] = {
    "amortized": Inference(
        lambda tables: tables.posterior_means,
        np.add,
        lambda prior, total: total,
        prior=lambda tables: tables.prior_means,
        margins=None,
        mixture=lambda total, n: total / max(n, 1),
    )
}
"""Rules for a Gaussian latent."""
OWN_MAJORITY = "own_majority"
LABELS: Mapping[str, Inference] = {
    OWN_MAJORITY: Inference(
        lambda tables: tables.signs,
        np.add,
        lambda prior, total: total,
        prior=lambda tables: None if tables.signs is None else np.zeros_like(tables.signs),
        margins=lambda total, tables: (total * np.asarray(tables.signs)).sum(-1),
        mixture=None,
    )
}
"""Rules that use labels alone."""


def inferences_of(tables: CodeTables) -> dict[str, Inference]:
    """Return the rules whose quantities the tables have, by name."""
    rules = {**INFERENCES, **(GAUSSIAN if tables.posterior_means is not None else {}), **LABELS}
    return {name: rule for name, rule in rules.items() if rule.contributions(tables) is not None}


def log_weights_by_shots(
    inference: Inference, prior: Table, contributions: Table, sources: NDArray[np.int64], shots: Sequence[int]
) -> Iterator[tuple[int, Table]]:
    """Infer log weights for each pair from its first n labelled pairs.

    Args:
        inference: The rule.
        prior: (..., m, K) `inference.prior` of the pairs.
        contributions: (s, K) `inference.contributions` of the labelled pairs.
        sources: (..., m, N) indices of each pair's labelled pairs, in order.
        shots: Values of n, in rising order and at most N.

    Yields:
        n and (..., m, K) log weights, up to a constant of each row.
    """
    combined: Table | None = None
    used = 0
    for n in shots:
        while used < n:
            added = contributions[sources[..., used]]
            combined = added if combined is None else inference.combine(combined, added)
            used += 1
        yield n, prior if combined is None else inference.log_weights(prior, combined)


def others_majority(signs: Table, prompts: Sequence[str], annotators: Sequence[str]) -> Table:
    """Compute how far the other annotators of the same prompt agree with each label.

    Args:
        signs: (n, 1) which of two answers was chosen, 1 or -1.
        prompts: (n,) the prompt of each pair.
        annotators: (n,) the annotator of each pair.

    Returns:
        (n,) number of other annotators' labels that agree, minus those that do not.
    """
    chosen = signs[:, 0]
    totals: dict[str | tuple[str, str], float] = {}
    for prompt, annotator, sign in zip(prompts, annotators, chosen, strict=True):
        for key in (prompt, (prompt, annotator)):
            totals[key] = totals.get(key, 0.0) + sign
    others = [totals[key] - totals[key, name] for key, name in zip(prompts, annotators, strict=True)]
    return np.array(others) * chosen


def correct(margins: Table) -> Table:
    """Return 1 for a positive margin, 0 for a negative one, and 1/2 for a tie.

    This is the definition of `lpc_lightning.algorithms.metrics.accuracies`.
    """
    return (np.sign(margins) + 1) / 2


def code_weights(tables: CodeTables, annotators: Sequence[str]) -> dict[str, Table]:
    """Compute (K,) weights over the codes for each annotator from all pairs of that annotator.

    The weights are the mean prior times the likelihood of the labels, normalized.

    Args:
        tables: Tables of n pairs.
        annotators: (n,) the annotator of each pair.
    """
    names = np.asarray(annotators)
    weights = {}
    for name in np.unique(names):
        members = names == name
        mean_prior = logsumexp(tables.log_prior[members], axis=0) - np.log(members.sum())
        weights[str(name)] = np.exp(log_softmax(mean_prior + tables.log_likelihoods[members].sum(0)))
    return weights
