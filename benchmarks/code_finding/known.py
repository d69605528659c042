"""Readers are known: a code of each reader by ridge regression, by the number of the reader's pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.code_finding.pairs import Floats, Pairs
from benchmarks.code_finding.ridge import PENALTIES, Components, folds_of, held_out_predictions, solve_path
from benchmarks.code_finding.scores import Key, Scores, is_correct

RowFunction = Callable[[Pairs], Floats]
"""Function from pairs to (N, d) rows that have the opposite sign under the opposite label."""


def rows_by_name(layers: Sequence[int]) -> dict[str, RowFunction]:
    """Return the rows that are compared: gradients at the head, and differences of mean states at layers."""

    def difference(layer: int) -> RowFunction:
        return lambda pairs: pairs.mean_difference(layer)

    return {"gradient": lambda pairs: pairs.gradient} | {f"mean state {layer}": difference(layer) for layer in layers}


def score_known(pairs: Pairs, rows: dict[str, RowFunction], sizes: Sequence[int], seeds: Sequence[int]) -> Scores:
    """Score a ridge code of each reader on the reader's test pairs.

    Only readers with as many training pairs as the largest size count. The penalty is the same for all readers, and has
    the smallest squared error of held-out prompts among the drawn pairs.

    Args:
        pairs: The pairs. Their factor is the reader.
        rows: Rows by name.
        sizes: Numbers of training pairs of a reader.
        seeds: Seeds of the drawn pairs and of the folds.
    """
    train, test = (pairs.at(pairs.part == part) for part in ("train", "test"))
    names, counts = np.unique(train.factor, return_counts=True)
    readers = [name for name in names[counts >= max(sizes)] if (test.factor == name).any()]
    if not readers:
        raise SystemExit(
            f"--sizes: found no reader with {max(sizes)} training pairs (the largest has {max(counts, default=0)}), "
            "expected one. Use smaller sizes."
        )
    test = test.at(np.isin(test.factor, readers))
    scores = Scores()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        orders = {name: rng.permutation(np.flatnonzero(train.factor == name)) for name in readers}
        folds = folds_of(train.prompt, rng)
        correct: dict[Key, Floats] = {}
        for arm, function in rows.items():
            fitted, held = function(train).astype(float), function(test).astype(float)
            for size in sizes:
                drawn = {name: order[:size] for name, order in orders.items()}
                components = Components.fit(fitted[np.concatenate(list(drawn.values()))])
                reduced, test_rows = components(fitted), components(held)
                errors = np.zeros(len(PENALTIES))
                for members in drawn.values():
                    predicted = held_out_predictions(reduced[members], np.ones((size, 1)), folds[members])
                    errors += np.square(1 - predicted[:, 0]).sum(0)
                penalty = PENALTIES[int(errors.argmin())]
                values = np.zeros(len(test))
                for name, members in drawn.items():
                    code = solve_path(reduced[members], np.ones(size), (penalty,))[:, 0]
                    own = test.factor == name
                    values[own] = is_correct(test_rows[own] @ code)
                correct[arm, size] = values
        scores.add_seed(test.prompt, correct)
    return scores
