"""A table with one row per pair. Reading it gathers the rows of all devices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lpc_lightning.types import PreferenceBatch

Row = dict[str, Any]


class PairTable(Metric):
    """Numbers and labels of every pair. torchmetrics gathers the rows of all devices.

    torchmetrics gathers tensors only, and devices see different label names. Labels are therefore stored as the bytes
    of JSON lines.
    """

    full_state_update = False

    def __init__(self) -> None:
        """Create an empty table."""
        super().__init__()
        self.add_state("numbers", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self.columns: tuple[str, ...] = ()
        self.numbers: list[Tensor]
        self.labels: list[Tensor]

    def update(self, numbers: Mapping[str, Tensor], labels: Sequence[Row]) -> None:
        """Add a batch.

        Args:
            numbers: (B,) values by column. Every update must have the same columns.
            labels: Further properties of each pair, as JSON values.
        """
        self.columns = tuple(numbers)
        stacked = torch.stack([value.detach().double() for value in numbers.values()], dim=-1)
        self.numbers.append(stacked.to(self.device))
        self.labels.append(_pack(labels).to(self.device))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return the numbers (n, columns) in float64, and the labels as bytes. `read` decodes both."""
        return dim_zero_cat(self.numbers), dim_zero_cat(self.labels)

    def read(self) -> tuple[dict[str, Tensor], list[Row]]:
        """Return the rows of all devices: (n,) numbers by column, on the CPU, and the labels of each row."""
        if not self.update_called:
            return {}, []
        numbers, labels = self.compute()
        numbers = numbers.cpu().view(-1, len(self.columns))  # torchmetrics turns a single number into a scalar
        return dict(zip(self.columns, numbers.unbind(-1), strict=True)), _unpack(labels)


def pair_labels(batch: PreferenceBatch) -> list[Row]:
    """Return the labels of each pair.

    They are id, source, factor, annotator, prompt (a hash; see `TokenizedPair.prompt`), `flipped` and `has_gold` (see
    `PreferenceExample`), and `tokens`, the numbers of tokens of the chosen and the rejected answer.
    """
    labels = {
        "id": batch.ids,
        "source": batch.sources,
        "factor": batch.factors,
        "annotator": batch.annotators,
        "prompt": batch.prompts,
        "flipped": batch.flipped.tolist(),
        "has_gold": batch.has_gold,
        "tokens": batch.lengths.view(2, -1).T.tolist(),
    }
    return [dict(zip(labels, values, strict=True)) for values in zip(*labels.values(), strict=True)]


def split_codes(name: str, values: Tensor) -> dict[str, Tensor]:
    """Split (B, K) values into K named columns."""
    return {f"{name}/{code}": value for code, value in enumerate(values.unbind(-1))}


def join_codes(columns: Mapping[str, NDArray[np.float64]], name: str) -> NDArray[np.float64]:
    """Join the columns of `split_codes`: (n, K).

    Raises:
        ValueError: There are no such columns.
    """
    return np.stack([values for each, values in columns.items() if each.startswith(f"{name}/")], axis=-1)


def _pack(rows: Iterable[Row]) -> Tensor:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def _unpack(packed: Tensor) -> list[Row]:
    return [json.loads(line) for line in packed.cpu().numpy().tobytes().splitlines()]
