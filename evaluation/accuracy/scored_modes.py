"""Metrics of pairs that are scored in every mode of z."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from lpc_lightning.algorithms.metrics import accuracies
from lpc_lightning.clustered_means import standard_error
from lpc_lightning.evaluation.accuracy.mode_margins import LABEL_CORRECT, SWAPPED, turnover
from lpc_lightning.evaluation.accuracy.pair_table import Row
from lpc_lightning.evaluation.statistics.calibration import calibration_error, wrong_label_auroc

LENGTH_MATCHED = "/length_matched"
"""Suffix of metrics over pairs whose longer answer has less than `LENGTH_RATIO` times the tokens of the shorter one."""
LENGTH_RATIO = 1.5
Values = dict[str, tuple[Tensor, Tensor]]
"""By metric, the values of some pairs, and those pairs as (n,) booleans. The mean of the values is the metric."""


@dataclass(frozen=True)
class ScoredPairs:
    """Labels and margins of n pairs, and their metrics."""

    rows: Sequence[Row]
    """Labels of each pair (see `pair_labels`), and `unshuffled`, true without the mode `shuffled`."""
    margins: dict[str, Tensor]
    """(n,) margins by mode."""
    scaled: dict[str, Tensor]
    """(n,) margins by `MODE/SCALE`. NaN for a pair without the mode."""

    @classmethod
    def from_columns(cls, columns: Mapping[str, Tensor], rows: Sequence[Row]) -> ScoredPairs:
        """Make it from the numbers and labels of a `PairTable`."""
        scaled = {name: values for name, values in columns.items() if "/" in name}
        return cls(rows, {name: values for name, values in columns.items() if name not in scaled}, scaled)

    @classmethod
    def from_items(cls, items: Sequence[Row]) -> ScoredPairs:
        """Make it from the rows of `items`, without scaled margins."""
        modes = dict.fromkeys(mode for item in items for mode in item["margins"])
        margins = {mode: [item["margins"].get(mode, math.nan) for item in items] for mode in modes}
        rows = [{**item, "unshuffled": "shuffled" not in item["margins"]} for item in items]
        return cls(rows, {mode: torch.tensor(each, dtype=torch.float64) for mode, each in margins.items()}, {})

    @cached_property
    def unshuffled(self) -> Tensor:
        """(n,) true for pairs without the mode `shuffled`."""
        return torch.tensor([row["unshuffled"] for row in self.rows])

    @cached_property
    def flipped(self) -> Tensor:
        """(n,) true for pairs whose label is known to be wrong."""
        return torch.tensor([row["flipped"] for row in self.rows])

    @cached_property
    def is_known(self) -> Tensor:
        """(n,) true for pairs whose right label is known: those with a gold label.

        Without gold labels it is all pairs if label noise has flipped some, and otherwise none. Rows of earlier
        versions lack `has_gold`.
        """
        has_gold = torch.tensor([row.get("has_gold", False) for row in self.rows])
        return has_gold if has_gold.any() else self.flipped.any().expand(len(self.rows))

    @cached_property
    def longer(self) -> Tensor:
        """(n,) tokens of the chosen answer minus those of the other one."""
        return torch.tensor([row["tokens"][0] - row["tokens"][1] for row in self.rows], dtype=torch.float64)

    @cached_property
    def prompts(self) -> NDArray[np.str_]:
        """(n,) keys of the prompts."""
        return np.array([row["prompt"] for row in self.rows])

    def means(self, groups: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics that are means over pairs, and their standard errors. Pairs of one prompt are a cluster.

        Args:
            groups: (n,) members of each group, by the suffix of its metrics. Scaled margins count over all pairs only.
        """
        values = self.values(groups) | self._scaled_values()
        errors = {name: standard_error(v.numpy(), self.prompts[scored.numpy()]) for name, (v, scored) in values.items()}
        return (
            {name: float(value.mean()) for name, (value, _) in values.items()},
            {name: error for name, error in errors.items() if error is not None},
        )

    def values(self, groups: Mapping[str, Tensor]) -> Values:
        """Return the values of single pairs behind each metric of the groups, without scaled margins."""
        values: Values = {}
        for suffix, members in groups.items():
            of_group = self._mode_values(members)
            if suffix in ("", LENGTH_MATCHED):
                of_group |= self._length_values(members)
            values |= {name + suffix: value for name, value in of_group.items()}
        return values

    def calibration(self) -> dict[str, float]:
        """Return `calibration_error/MODE`, and with wrong labels its like and `wrong_label_auroc/MODE`."""
        metrics = {name: calibration_error(margins) for name, (margins, _) in self.calibrated().items()}
        known, wrong = self.is_known, self.flipped[self.is_known]
        if wrong.any() and not wrong.all():
            for mode, margins in self.margins.items():
                if mode not in (SWAPPED, "shuffled"):
                    metrics[f"wrong_label_auroc/{mode}"] = wrong_label_auroc(margins[known], wrong)
        return metrics

    def calibrated(self) -> Values:
        """Return the margins behind each calibration error, by the name of the metric, and the pairs that have them."""
        modes = {mode: each for mode, each in self.margins.items() if mode not in (SWAPPED, "shuffled", LABEL_CORRECT)}
        known, everyone = self.is_known, torch.ones(len(self.rows), dtype=torch.bool)
        margins = {f"calibration_error/{mode}": (each, everyone) for mode, each in modes.items()}
        if known.any():
            gold = {mode: torch.where(self.flipped, -each, each)[known] for mode, each in modes.items()}
            margins |= {f"gold_calibration_error/{mode}": (each, known) for mode, each in gold.items()}
        return margins

    def items(self) -> list[Row]:
        """Return a row for each pair: its labels, `margins` by mode, and with scales `scaled` by `MODE/SCALE`."""
        return [self._item(index, row) for index, row in enumerate(self.rows)]

    def _mode_values(self, members: Tensor) -> Values:
        values: Values = {}
        for mode, margins in self.margins.items():
            scored = members & ~self.unshuffled if mode == "shuffled" else members
            if mode in (SWAPPED, LABEL_CORRECT) or not scored.any():
                continue
            differences = margins[scored]
            values[f"accuracy/{mode}"] = accuracies(differences), scored
            values[f"margin/{mode}"] = differences, scored
            values[f"log_loss/{mode}"] = softplus(-differences), scored
            if (known := scored & self.is_known).any():
                gold = torch.where(self.flipped, -margins, margins)[known]
                values[f"gold_accuracy/{mode}"] = accuracies(gold), known
                values[f"gold_log_loss/{mode}"] = softplus(-gold), known
        if SWAPPED in self.margins:
            posterior, swapped = self.margins["posterior"], self.margins[SWAPPED]
            values["swap_turnover"] = turnover(posterior[members], swapped[members]), members
        return values

    def _length_values(self, members: Tensor) -> Values:
        values: Values = {"longer_is_chosen": (accuracies(self.longer[members]), members)}
        if (known := members & self.is_known).any():
            gold = torch.where(self.flipped, -self.longer, self.longer)
            values["gold_longer_is_chosen"] = accuracies(gold[known]), known
        return values

    def _scaled_values(self) -> Values:
        scored = {name: ~values.isnan() for name, values in self.scaled.items()}
        return {
            f"accuracy/{name}": (accuracies(values[scored[name]]), scored[name])
            for name, values in self.scaled.items()
            if scored[name].any()
        }

    def _item(self, index: int, row: Row) -> Row:
        item = {name: value for name, value in row.items() if name != "unshuffled"}
        numbers = {name: float(values[index]) for name, values in self.margins.items()}
        if LABEL_CORRECT in numbers:
            item[LABEL_CORRECT] = numbers.pop(LABEL_CORRECT)
        item["margins"] = {
            mode: number for mode, number in numbers.items() if not (mode == "shuffled" and row["unshuffled"])
        }
        if self.scaled:
            scaled = {name: float(values[index]) for name, values in self.scaled.items()}
            item["scaled"] = {name: number for name, number in scaled.items() if not math.isnan(number)}
        return item
