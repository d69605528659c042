"""Accuracy on each annotator's pairs, given n others of the same annotator, and what it may vary by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.adaptation.inference import INFERENCES, CodeTables, Table, adapted, correct, margins
from lpc_lightning.seeding import derive

SHOTS = (0, 1, 2, 4, 8, 16)
"""Labelled pairs that are given, where nothing else is asked for."""


@dataclass(frozen=True)
class Score:
    """An accuracy over pairs, each with its mean over the rounds."""

    accuracy: float
    standard_error: float | None
    """Over pairs, as if none had to do with another; None for one pair."""
    annotators_error: float | None
    """Standard error over annotators, whose pairs may have to do with each other; None for one annotator."""
    pairs: int
    """How many were predicted."""
    by_annotator: Mapping[str, float]
    """Each annotator's own."""


@dataclass(frozen=True)
class Turn:
    """One annotator's pairs, predicted in one way in every round."""

    inference: str
    shots: int
    rows: NDArray[np.int64]
    """(rounds, m) where the pairs stand in the tables."""
    log_weights: Table
    """(rounds, m, K) over the codes, from the labelled pairs given for each, up to a constant of each row."""


def turns(
    tables: CodeTables, ids: Sequence[str], annotators: Sequence[str], shots: Sequence[int], rounds: int, seed: int
) -> Iterator[Turn]:
    """Everything that is inferred: by annotator, inference and n, for annotators with more than n pairs.

    In each round an annotator's pairs stand in a circle (see `circles`), and each is told from the n that follow it:
    every pair counts alike at every n, never sees its own label, and what is given at a smaller n is given at a larger
    one as well.

    Args:
        tables: Of n pairs.
        ids: (n,) the pairs' names.
        annotators: (n,) who labelled each.
        shots: Labelled pairs to give, from 0.
        rounds: Random orders.
        seed: Of the orders.

    Raises:
        ConfigError: A negative number of shots, or less than one round.
    """
    check_shots(shots, rounds)
    names = np.asarray(annotators)
    said = {kind: table for kind, each in INFERENCES.items() if (table := each.says(tables)) is not None}
    for name in np.unique(names):
        (members,) = np.nonzero(names == name)
        reached = [n for n in sorted(set(shots)) if n < len(members)]
        rows = circles(members, ids, rounds, seed)
        for kind, table in said.items():
            for n, weights in adapted(INFERENCES[kind], tables.log_prior[rows], table[rows], reached):
                yield Turn(kind, n, rows, weights)


def adaptation_scores(
    tables: CodeTables,
    ids: Sequence[str],
    annotators: Sequence[str],
    shots: Sequence[int] = SHOTS,
    rounds: int = 20,
    seed: int = 0,
) -> dict[str, dict[int, Score]]:
    """Accuracy on each annotator's pairs, given n others of the same annotator.

    At n = 0 nothing is drawn, and the score is that of the prior. Arguments and errors as for `turns`.

    Returns:
        By inference (`exact`, and `amortised` where there is a learned posterior) and n. Annotators with n pairs or
        fewer are left out at this n, and an n at which none is left is missing.
    """
    names = np.asarray(annotators)
    right: dict[str, dict[int, Table]] = {
        kind: {} for kind, each in INFERENCES.items() if each.says(tables) is not None
    }
    predicted: dict[int, NDArray[np.bool_]] = {}
    for turn in turns(tables, ids, annotators, shots, rounds, seed):
        sums = right[turn.inference].setdefault(turn.shots, np.zeros(len(names)))
        np.add.at(sums, turn.rows, correct(margins(turn.log_weights, tables.take(turn.rows))))
        predicted.setdefault(turn.shots, np.zeros(len(names), dtype=bool))[turn.rows] = True
    # Sums of halves are exact: only the division rounds, and what is right in every round is 1.
    return {
        kind: {n: mean_score(sums[predicted[n]] / rounds, names[predicted[n]]) for n, sums in sorted(each.items())}
        for kind, each in right.items()
    }


def adaptation_mixtures(
    tables: CodeTables, ids: Sequence[str], annotators: Sequence[str], shots: Sequence[int] = SHOTS, seed: int = 0
) -> dict[int, dict[str, Table]]:
    """(K,) weights over the codes for each pair from n others of its annotator: `exact`, in the first round.

    Arguments and errors as for `turns`.

    Returns:
        By n and the pair's id; without the pairs of annotators with n pairs or fewer.
    """
    found: dict[int, dict[str, Table]] = {}
    for turn in turns(tables, ids, annotators, shots, 1, seed):
        if turn.inference == "exact":
            (rows,), (weights,) = turn.rows, np.exp(log_softmax(turn.log_weights, axis=-1))
            found.setdefault(turn.shots, {}).update(zip((ids[row] for row in rows), weights, strict=True))
    return found


def circles(members: NDArray[np.int64], ids: Sequence[str], rounds: int, seed: int = 0) -> NDArray[np.int64]:
    """(rounds, m) one annotator's pairs in the order of a hash of (seed, round, id).

    The order of two pairs is the same whatever other pairs there are, and in whatever order they come.

    Args:
        members: (m,) places of the pairs.
        ids: (n,) the names of all pairs.
        rounds: How many orders.
        seed: Of the hash.
    """
    keys = [[derive("adapt", seed, number, ids[place]) for place in members] for number in range(rounds)]
    return members[np.argsort(keys, axis=-1, kind="stable")]


def mean_score(values: Table, annotators: NDArray[np.str_]) -> Score:
    """Mean and standard errors of (n,) values, at least one, and (n,) the annotators whose they are.

    With S_a the sum of an annotator's values less the mean, and A annotators, the error over annotators is
    sqrt(A / (A - 1) sum_a S_a^2) / n (Liang and Zeger 1986): for annotators with as many pairs each, that of the mean
    of their means.
    """
    mean = values.mean()
    names, of = np.unique(annotators, return_inverse=True)
    pairs, sums = np.bincount(of), np.bincount(of, values)
    several = len(names) > 1
    spread = np.square(sums - mean * pairs).sum() * len(names) / (len(names) - 1) if several else None
    return Score(
        accuracy=float(mean),
        standard_error=float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
        annotators_error=None if spread is None else float(spread**0.5 / len(values)),
        pairs=len(values),
        by_annotator={str(name): float(each) for name, each in zip(names, sums / pairs, strict=True)},
    )


def check_shots(shots: Sequence[int], rounds: int) -> None:
    """Refuse settings that mean nothing.

    Raises:
        ConfigError: Says which.
    """
    if not shots or min(shots) < 0:
        raise ConfigError(f"shots: found {list(shots)}, expected numbers of labelled pairs, 0 or more.")
    if rounds < 1:
        raise ConfigError(f"rounds: found {rounds}, expected at least 1.")
