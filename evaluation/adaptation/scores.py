"""Accuracy on each annotator's pairs given n others of the same annotator, with standard errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpc_lightning.clustered_means import ClusterScores, cluster_scores, cluster_sums, standard_error
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.adaptation.inference import (
    CodeTables,
    Table,
    correct,
    inferences_of,
    log_weights_by_shots,
)
from lpc_lightning.seeding import derive

SHOTS = (0, 1, 2, 4, 8, 16)
"""Default numbers of labelled pairs."""


PairKey = tuple[str, str]
"""Annotator and content of a pair. Ids may repeat, and copies of a pair have the same weights."""


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
    prompts: int
    """Number of their prompts."""
    by_annotator: Mapping[str, float]
    """Accuracy of each annotator."""
    of_prompts: ClusterScores
    """What the pairs of each prompt add to the accuracy."""
    of_annotators: ClusterScores
    """What the pairs of each annotator add to it."""
    of_both: ClusterScores
    """What the pairs of each annotator with each prompt add to it."""


@dataclass(frozen=True)
class PairTables:
    """Tables of some pairs, and what identifies each pair."""

    tables: CodeTables
    """Tables of the pairs."""
    ids: Sequence[str]
    """Ids of the pairs."""
    annotators: Sequence[str]
    """Annotator of each pair."""
    prompts: Sequence[str] | None = None
    """Prompt of each pair. None: each pair has a prompt of its own."""
    contents: Sequence[str] | None = None
    """What each pair consists of, whatever its label and id. Copies of a pair have the same. None: the ids."""

    @property
    def keys(self) -> list[PairKey]:
        """Annotator and content of each pair."""
        return list(zip(self.annotators, self.contents or self.ids, strict=False))


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
    pairs: PairTables,
    shots: Sequence[int],
    rounds: int,
    seed: int,
    labelled: PairTables | None = None,
) -> Iterator[InferredWeights]:
    """Infer weights for each annotator, each inference and each n.

    In each round, the pairs of an annotator are in a circular order (see `circular_orders`). The weights of a pair come
    from the n pairs that follow it. Every pair counts equally at every n, never uses its own label, and uses at a
    larger n all pairs that it uses at a smaller one.

    With `labelled`, the weights of all pairs of an annotator come from the first n of the annotator's labelled pairs,
    in an order that changes with the round.

    Copies of a pair (see `PairTables.contents`) are passed over. Annotators with fewer than n labelled pairs for one
    of their pairs are left out (see `labels_available`).

    Args:
        pairs: All pairs that get weights.
        shots: Numbers n of labelled pairs, 0 or more.
        rounds: Number of random orders.
        seed: Seed of the orders.
        labelled: Pairs that give the labels. None: the other pairs of the annotator.

    Raises:
        ConfigError: `shots` is empty or has a negative number, or `rounds` is less than 1.
    """
    check_shots(shots, rounds)
    names, rules = np.asarray(pairs.annotators), inferences_of(pairs.tables)
    given = pairs if labelled is None else labelled
    givers, available = np.asarray(given.annotators), labels_available(pairs, labelled)
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*pairs.keys, *given.keys]))}
    contents, given_contents = (np.array([numbers[key] for key in part.keys], dtype=int) for part in (pairs, given))
    tables = {name: rule.contributions(given.tables) for name, rule in rules.items()}
    contributions = {name: table for name, table in tables.items() if table is not None}
    for annotator in np.unique(names):
        (members,) = np.nonzero(names == annotator)
        rows = circular_orders(members, pairs.ids, rounds, seed)
        possible = [n for n in sorted(set(shots)) if n <= available[annotator]]
        if labelled is None:
            order, starts = rows, np.arange(1, len(members) + 1)
        else:
            own = np.flatnonzero(givers == annotator)
            order, starts = circular_orders(own, labelled.ids, rounds, seed), np.zeros(1, dtype=int)
        most, length = max(possible, default=0), order.shape[-1]
        # Among so many candidates, every pair has `most` that are no copies of it.
        steps = np.arange(most + length - available[annotator])
        candidates = order[:, (starts[:, None] + steps) % max(length, 1)]
        is_copy = given_contents[candidates] == contents[rows][..., None]
        sources = np.take_along_axis(candidates, np.argsort(is_copy, kind="stable")[..., :most], axis=-1)
        for name, table in contributions.items():
            prior = rules[name].prior(pairs.tables)[rows]
            for n, log_weights in log_weights_by_shots(rules[name], prior, table, sources, possible):
                yield InferredWeights(name, n, rows, log_weights)


def labels_available(pairs: PairTables, labelled: PairTables | None = None) -> dict[str, int]:
    """Return how many labelled pairs of an annotator each of the annotator's pairs has at least, without its copies.

    Args:
        pairs: Pairs that get weights.
        labelled: Pairs that give the labels. None: the other pairs of the annotator.
    """
    given = pairs if labelled is None else labelled
    totals, copies = Counter(given.annotators), Counter(given.keys)
    available: dict[str, int] = {}
    for annotator, content in pairs.keys:
        others = totals[annotator] - copies[annotator, content]
        available[annotator] = min(others, available.get(annotator, others))
    return available


def adaptation_scores(
    pairs: PairTables,
    shots: Sequence[int] = SHOTS,
    rounds: int = 20,
    seed: int = 0,
    labelled: PairTables | None = None,
) -> dict[str, dict[int, Score]]:
    """Compute the accuracy on each annotator's pairs, given n others of the same annotator.

    At n = 0 nothing is random, and the score is that of the prior. Arguments and errors are those of `infer_weights`.

    Returns:
        Scores by inference (`exact`; `amortized` if a posterior over codes is learned; `own_majority` if all pairs have
        the same two answers) and n. At each n, annotators with too few pairs are left out. An n at which no annotator
        is left is missing.
    """
    tables, names = pairs.tables, np.asarray(pairs.annotators)
    contexts = np.arange(len(names)) if pairs.prompts is None else np.asarray(pairs.prompts)
    rules = {name: rule.margins for name, rule in inferences_of(tables).items() if rule.margins is not None}
    sums: dict[str, dict[int, Table]] = {name: {} for name in rules}
    predicted: dict[int, NDArray[np.bool_]] = {}
    for inferred in infer_weights(pairs, shots, rounds, seed, labelled):
        if (predict := rules.get(inferred.inference)) is None:
            continue
        table = sums[inferred.inference].setdefault(inferred.shots, np.zeros(len(names)))
        np.add.at(table, inferred.rows, correct(predict(inferred.log_weights, tables.take(inferred.rows))))
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
    pairs: PairTables,
    shots: Sequence[int] = SHOTS,
    seed: int = 0,
    labelled: PairTables | None = None,
) -> dict[str, dict[int, dict[PairKey, Table]]]:
    """Compute (K,) weights w of z = sum_k w_k e_k for each pair from n others of its annotator, in the first round.

    Arguments and errors are those of `infer_weights`.

    Returns:
        Weights by inference, by n, and by annotator and content of the pair. Pairs of annotators with too few pairs
        are left out.
    """
    rules, keys = inferences_of(pairs.tables), pairs.keys
    mixtures: dict[str, dict[int, dict[PairKey, Table]]] = {}
    for inferred in infer_weights(pairs, shots, 1, seed, labelled):
        if (to_mixture := rules[inferred.inference].mixture) is not None:
            (rows,), (weights,) = inferred.rows, to_mixture(inferred.log_weights, inferred.shots)
            by_shots = mixtures.setdefault(inferred.inference, {})
            by_shots.setdefault(inferred.shots, {}).update(zip([keys[row] for row in rows], weights, strict=True))
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
        prompts=len(np.unique(prompts)),
        by_annotator=dict(zip(np.unique(annotators).tolist(), (sums / pairs).tolist(), strict=True)),
        of_prompts=cluster_scores(values, prompts),
        of_annotators=cluster_scores(values, annotators),
        of_both=cluster_scores(values, [f"{prompt} {name}" for prompt, name in zip(prompts, annotators, strict=True)]),
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
