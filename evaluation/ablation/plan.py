"""The cells of a grid with their folders, and the decision which of them to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lpc_lightning.evaluation.ablation.fingerprint import fingerprint
from lpc_lightning.evaluation.ablation.folder import CellFolder, Record, Weights
from lpc_lightning.evaluation.ablation.grid import Cell


@dataclass(frozen=True)
class PlannedCell:
    """A cell of the grid, with its folder and the record of a new run."""

    number: int
    """Index of the cell in the grid."""
    folder: CellFolder
    new_record: Record
    """The record that a new run would start with."""

    def needs_run(self, retry_failed: bool, keep_stale: bool) -> bool:
        """Return True if the cell must run. See `ablate` for the settings."""
        record = self.folder.record()
        if record is None:
            return True
        if record.fingerprint != self.new_record.fingerprint:
            return not (keep_stale and self.folder.is_finished)
        return not self.folder.is_finished and (record.status != "failed" or retry_failed)


def plan(output: Path, cells: Sequence[Cell], weights: Weights) -> list[PlannedCell]:
    """Return the cells with their folders and new records.

    Args:
        output: The ablation's folder.
        cells: All cells of the grid.
        weights: Weights to validate and test.
    """
    return [
        PlannedCell(
            number,
            CellFolder(output / "cells" / cell.name),
            Record(cell.axes, cell.axes.get("seed"), fingerprint(cell.arguments, weights), cell.arguments),
        )
        for number, cell in enumerate(cells)
    ]
