"""A table with one row a pair, complete on every device once it is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lpc_lightning.types import PreferenceBatch

Row = dict[str, Any]


class PairTable(Metric):
    """Numbers and labels of every pair. Over several devices, torchmetrics gathers the rows of all of them.

    Tensors are all that torchmetrics sends, and no device knows the names that another one sees: labels travel as the
    bytes of JSON lines.
    """

    full_state_update = False

    def __init__(self) -> None:
        """Start with no rows."""
        super().__init__()
        self.add_state("numbers", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.columns: tuple[str, ...] = ()
        self.numbers: list[Tensor]
        self.labels: list[Tensor]

    def update(self, numbers: Mapping[str, Tensor], labels: Sequence[Row]) -> None:
        """Take in a batch.

        Args:
            numbers: (B,) values by column; the columns are the same at every update.
            labels: What else there is to say of each pair, as JSON values.
        """
        self.columns = tuple(numbers)
        stacked = torch.stack([value.detach().double() for value in numbers.values()], dim=-1)
        self.numbers.append(stacked.to(self.device))
        self.labels.append(_packed(labels).to(self.device))

    def compute(self) -> tuple[Tensor, Tensor]:
        """(n, columns) numbers, float64, and the labels' bytes. `read` makes them legible."""
        return dim_zero_cat(self.numbers), dim_zero_cat(self.labels)

    def read(self) -> tuple[dict[str, Tensor], list[Row]]:
        """The rows of all devices: (n,) numbers by column, on the CPU, and the labels of each row."""
        if not self.update_called:
            return {}, []
        numbers, labels = self.compute()
        return dict(zip(self.columns, numbers.cpu().unbind(-1), strict=True)), _unpacked(labels)


def pair_labels(batch: PreferenceBatch) -> list[Row]:
    """Who each pair of a batch is: id, source, factor, annotator, and whether label noise flipped it."""
    columns = (batch.ids, batch.sources, batch.factors, batch.annotators, batch.flipped.tolist())
    names = ("id", "source", "factor", "annotator", "flipped")
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _packed(rows: Iterable[Row]) -> Tensor:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> list[Row]:
    return [json.loads(line) for line in packed.cpu().numpy().tobytes().splitlines()]
