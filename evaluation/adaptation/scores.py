"""Accuracy on each annotator's pairs given n others of the same annotator, with standard errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.adaptation.inference import (
    INFERENCES,
    CodeTables,
    Table,
    correct,
    log_weights_by_shots,
    margins,
)
from lpc_lightning.evaluation.statistics.clusters import cluster_sums, standard_error
from lpc_lightning.seeding import derive

SHOTS = (0, 1, 2, 4, 8, 16)
"""Default numbers of labelled pairs."""


PairKey = tuple[str, str]
"""Annotator and id of a pair. Several annotators may label pairs with the same id."""


@dataclass(frozen=True)
class Score:
    """An accuracy over pairs. The value of a pair is its mean over the rounds."""

    accuracy: float
    standard_error: float | None
    """Standard error over prompts, whose pairs may be dependent. None for one prompt."""
    annotators_error: float | None
    """Standard error over annotators, whose pairs may be dependent. None for one annotator."""
    pairs: int
    """Number of predicted pairs."""
    by_annotator: Mapping[str, float]
    """Accuracy of each annotator."""


@dataclass(frozen=True)
class InferredWeights:
    """Weights over the codes for all pairs of one annotator, under one inference, in every round."""

    inference: str
    shots: int
    rows: NDArray[np.int64]
    """(rounds, m) indices of the pairs in the tables."""
    log_weights: Table
    """(rounds, m, K) log weights for each pair, from its labelled pairs, up to a constant of each row."""


def infer_weights(
    tables: CodeTables, ids: Sequence[str], annotators: Sequence[str], shots: Sequence[int], rounds: int, seed: int
) -> Iterator[InferredWeights]:
    """Infer weights for each annotator, each inference and each n. Annotators with n pairs or fewer are left out.

    In each round, the pairs of an annotator are in a circular order (see `circular_orders`). The weights of a pair come
    from the n pairs that follow it. Every pair counts equally at every n, never uses its own label, and uses at a
    larger n all pairs that it uses at a smaller one.

    Args:
        tables: Tables of all pairs.
        ids: (pairs,) ids of the pairs.
        annotators: (pairs,) the annotator of each pair.
        shots: Numbers n of labelled pairs, 0 or more.
        rounds: Number of random orders.
        seed: Seed of the orders.

    Raises:
        ConfigError: `shots` is empty or has a negative number, or `rounds` is less than 1.
    """
    check_shots(shots, rounds)
    names = np.asarray(annotators)
    contributions = {
        name: table for name, inference in INFERENCES.items() if (table := inference.contributions(tables)) is not None
    }
    for annotator in np.unique(names):
        (members,) = np.nonzero(names == annotator)
        possible = [n for n in sorted(set(shots)) if n < len(members)]
        rows = circular_orders(members, ids, rounds, seed)
        for name, table in contributions.items():
            by_shots = log_weights_by_shots(INFERENCES[name], tables.log_prior[rows], table[rows], possible)
            for n, log_weights in by_shots:
                yield InferredWeights(name, n, rows, log_weights)


def adaptation_scores(
    tables: CodeTables,
    ids: Sequence[str],
    annotators: Sequence[str],
    shots: Sequence[int] = SHOTS,
    rounds: int = 20,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
) -> dict[str, dict[int, Score]]:
    """Compute the accuracy on each annotator's pairs, given n others of the same annotator.

    At n = 0 nothing is random, and the score is that of the prior. Arguments and errors are those of `infer_weights`.
    `prompts` are (pairs,) the prompt of each pair, or None if each pair has a prompt of its own.

    Returns:
        Scores by inference (`exact`, and `amortised` if a posterior is learned) and n. At each n, annotators with n
        pairs or fewer are left out. An n at which no annotator is left is missing.
    """
    names = np.asarray(annotators)
    contexts = np.arange(len(names)) if prompts is None else np.asarray(prompts)
    sums: dict[str, dict[int, Table]] = {
        name: {} for name, inference in INFERENCES.items() if inference.contributions(tables) is not None
    }
    predicted: dict[int, NDArray[np.bool_]] = {}
    for inferred in infer_weights(tables, ids, annotators, shots, rounds, seed):
        table = sums[inferred.inference].setdefault(inferred.shots, np.zeros(len(names)))
        np.add.at(table, inferred.rows, correct(margins(inferred.log_weights, tables.take(inferred.rows))))
        predicted.setdefault(inferred.shots, np.zeros(len(names), dtype=bool))[inferred.rows] = True
    # Sums of halves are exact. Only the division rounds, so that a pair that is correct in every round has the value 1.
    return {
        name: {
            n: mean_score(table[predicted[n]] / rounds, names[predicted[n]], contexts[predicted[n]])
            for n, table in sorted(by_n.items())
        }
        for name, by_n in sums.items()
    }


def adaptation_mixtures(
    tables: CodeTables, ids: Sequence[str], annotators: Sequence[str], shots: Sequence[int] = SHOTS, seed: int = 0
) -> dict[int, dict[PairKey, Table]]:
    """Compute (K,) weights over the codes for each pair from n others of its annotator: `exact`, in the first round.

    Arguments and errors are those of `infer_weights`.

    Returns:
        Weights by n and by annotator and id of the pair. Pairs of annotators with n pairs or fewer are left out.
    """
    mixtures: dict[int, dict[PairKey, Table]] = {}
    for inferred in infer_weights(tables, ids, annotators, shots, 1, seed):
        if inferred.inference == "exact":
            (rows,), (weights,) = inferred.rows, np.exp(log_softmax(inferred.log_weights, axis=-1))
            keys = [(annotators[row], ids[row]) for row in rows]
            mixtures.setdefault(inferred.shots, {}).update(zip(keys, weights, strict=True))
    return mixtures


def circular_orders(members: NDArray[np.int64], ids: Sequence[str], rounds: int, seed: int = 0) -> NDArray[np.int64]:
    """Order one annotator's pairs by a hash of (seed, round, id).

    The order of two pairs depends neither on the other pairs nor on the order of the input.

    Args:
        members: (m,) indices of the annotator's pairs.
        ids: (n,) ids of all pairs.
        rounds: Number of orders.
        seed: Seed of the hash.

    Returns:
        (rounds, m) indices.
    """
    keys = [[derive("adapt", seed, number, ids[member]) for member in members] for number in range(rounds)]
    return members[np.argsort(keys, axis=-1, kind="stable")]


def mean_score(values: Table, annotators: NDArray[np.str_], prompts: NDArray[Any]) -> Score:
    """Compute the mean of values over pairs, and its standard errors over prompts and over annotators.

    Args:
        values: (n,) values, at least one.
        annotators: (n,) the annotator of each value.
        prompts: (n,) the prompt of each value.
    """
    sums, pairs = cluster_sums(values, annotators)
    return Score(
        accuracy=float(values.mean()),
        standard_error=standard_error(values, prompts),
        annotators_error=standard_error(values, annotators),
        pairs=len(values),
        by_annotator=dict(zip(np.unique(annotators).tolist(), (sums / pairs).tolist(), strict=True)),
    )


def check_shots(shots: Sequence[int], rounds: int) -> None:
    """Check the settings of the random choices.

    Raises:
        ConfigError: `shots` is empty or has a negative number, or `rounds` is less than 1.
    """
    if not shots or min(shots) < 0:
        raise ConfigError(f"shots: found {list(shots)}, expected numbers of labelled pairs, 0 or more.")
    if rounds < 1:
        raise ConfigError(f"rounds: found {rounds}, expected at least 1.")
