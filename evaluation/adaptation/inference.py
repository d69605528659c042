"""Few-shot annotators: from n labelled pairs of somebody to the codes that speak for them, and to their other labels.

Everything is arithmetic on tables of pairs by codes. With p the prior, l_k a pair's loss under code k, l'_k that of the
same pair labelled the other way round, and S the n labelled pairs:

- `exact`: p(k given x, S) proportional to p_k(x) times the product over S of exp(-l_k), the codes' evidence
- `amortised`: the average over S of q(k given pair), q the learned posterior; the prior where S is empty
- the prediction under weights w: log sum_k w_k exp(-l_k) - log sum_k w_k exp(-l'_k), right where it is above zero

For DPO exp(-l_k) is the probability of the label under code k, so that `exact` is Bayes' rule and the prediction the
log-odds of the label: a mixture of what the codes say, not what is said under the mixture z = sum_k w_k e_k of the
codes: for that the policy must be asked again (`few_shot_policy`).
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
    """What the policy says of n pairs under each of K codes."""

    log_prior: Table
    """(n, K) log p_k(x)."""
    losses: Table
    """(n, K) l_k of the pair as labelled, in nats of evidence (`PairLosses.label_log_likelihood`)."""
    swapped: Table
    """(n, K) l_k of the pair labelled the other way round."""
    log_posterior: Table | None = None
    """(n, K) log q_k of the learned posterior; None where there is none."""

    def take(self, rows: NDArray[np.int64]) -> CodeTables:
        """Some of the pairs, as they stand in `rows` (...): tables (..., K)."""
        posterior = None if self.log_posterior is None else self.log_posterior[rows]
        return CodeTables(self.log_prior[rows], self.losses[rows], self.swapped[rows], posterior)


def single_code(margins: Table) -> CodeTables:
    """A policy without codes as one with a single code.

    Args:
        margins: (n,) of the pairs as labelled. The losses of the two labels count by their difference alone.
    """
    nothing = np.zeros((len(margins), 1))
    return CodeTables(nothing, nothing, margins[:, None])


@dataclass(frozen=True)
class Inference:
    """How the weights over the codes follow from labelled pairs."""

    says: Callable[[CodeTables], Table | None]
    """(n, K) what each pair adds, in logs; None where the space has no such thing."""
    join: np.ufunc
    """Puts together what several pairs say."""
    weights: Callable[[Table, Table], Table]
    """From the new pairs' log prior and what the labelled pairs say, (m, K) each, to log weights up to a constant."""


INFERENCES: Mapping[str, Inference] = {
    "exact": Inference(lambda tables: -tables.losses, np.add, lambda prior, evidence: prior + evidence),
    "amortised": Inference(lambda tables: tables.log_posterior, np.logaddexp, lambda prior, mean: mean),
}


def adapted(inference: Inference, log_prior: Table, said: Table, shots: Sequence[int]) -> Iterator[tuple[int, Table]]:
    """Log weights (..., m, K) for each pair of a circle from the n that follow it, up to a constant of each row.

    Args:
        inference: How.
        log_prior: (..., m, K) of the pairs, as they stand in their circles.
        said: (..., m, K) what `inference.says` of them.
        shots: Values of n, rising and below m.
    """
    told: Table | None = None
    given = 0
    for n in shots:
        while given < n:
            given += 1
            following = np.roll(said, -given, axis=-2)
            told = following if told is None else inference.join(told, following)
        yield n, log_prior if told is None else inference.weights(log_prior, told)


def margins(log_weights: Table, tables: CodeTables) -> Table:
    """(...) log sum_k w_k exp(-l_k) of the pairs as labelled, less that of the pairs labelled the other way round.

    Args:
        log_weights: (..., K), up to a constant of each row.
        tables: Of the same pairs.
    """
    found: Table = logsumexp(log_weights - tables.losses, axis=-1) - logsumexp(log_weights - tables.swapped, axis=-1)
    return found


def correct(margins: Table) -> Table:
    """1 where a margin is above zero, 0 below, 1/2 at a tie: `lpc_lightning.algorithms.metrics.accuracies`."""
    return (np.sign(margins) + 1) / 2


def code_weights(tables: CodeTables, annotators: Sequence[str]) -> dict[str, Table]:
    """(K,) each annotator's weights over the codes, from all their pairs: the mean prior times the evidence.

    Args:
        tables: Of n pairs.
        annotators: (n,) who labelled each.
    """
    names = np.asarray(annotators)
    found = {}
    for name in np.unique(names):
        members = names == name
        mean_prior = logsumexp(tables.log_prior[members], axis=0) - np.log(members.sum())
        found[str(name)] = np.exp(log_softmax(mean_prior - tables.losses[members].sum(0)))
    return found
