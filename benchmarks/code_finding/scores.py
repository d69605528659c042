"""Accuracies of several seeds on test pairs, with intervals over seeds and prompts."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.code_finding.pairs import Floats
from lpc_lightning.clustered_means import deviations, shares
from lpc_lightning.evaluation.statistics.seeds import Estimate, estimate
from lpc_lightning.evaluation.statistics.shared_clusters import shared_variance

Key = tuple[str, int]
"""Arm, and number of pairs or labels."""


@dataclass
class Scores:
    """Test pairs that each arm gets right, by seed."""

    prompts: list[NDArray[np.str_]] = field(default_factory=list)
    """(n,) prompts of the test pairs of each seed."""
    correct: dict[Key, list[Floats]] = field(default_factory=dict)
    """(n,) values of each seed, in the same order: 1 right, 0 wrong, 1/2 undecided."""

    def add_seed(self, prompts: NDArray[np.str_], correct: dict[Key, Floats]) -> None:
        """Add the values of a seed."""
        self.prompts.append(prompts)
        for key, values in correct.items():
            self.correct.setdefault(key, []).append(values)

    def accuracy(self, key: Key, baseline: Key | None = None) -> Estimate:
        """Estimate an accuracy, or its difference to that of another arm on the same pairs.

        The interval covers seeds and test prompts (see `shared_variance`).
        """
        values: Sequence[Floats] = self.correct[key]
        if baseline is not None:
            values = [own - other for own, other in zip(values, self.correct[baseline], strict=True)]
        added = [deviations(own, prompts) for own, prompts in zip(values, self.prompts, strict=True)]
        shared = shared_variance(added, {name: share for each in self.prompts for name, share in shares(each).items()})
        return estimate([float(own.mean()) for own in values], shared)

    def write(self, path: Path, baseline: str, unit: str) -> None:
        """Write a CSV file with a row for each arm and number.

        Args:
            path: The file.
            baseline: Arm to which the others are compared.
            unit: Name of the column of numbers.
        """
        header = ["arm", unit, "accuracy", "low", "high", "difference", "difference_low", "difference_high", "seeds"]
        rows: list[list[object]] = []
        for arm, number in self.correct:
            own, row = self.accuracy((arm, number)), [arm, number]
            row += [f"{value:.4f}" for value in (own.mean, own.low, own.high)]
            if arm == baseline or (baseline, number) not in self.correct:
                row += [""] * 3
            else:
                other = self.accuracy((arm, number), (baseline, number))
                row += [f"{value:.4f}" for value in (other.mean, other.low, other.high)]
            rows.append([*row, own.n])
        write_rows(path, header, rows)


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def is_correct(predictions: Floats) -> Floats:
    """Return 1 where a prediction is positive, 0 where it is negative and 1/2 where it is 0."""
    values: Floats = (np.sign(predictions) + 1) / 2
    return values
