"""Which cells of a grid are there already, and which are to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lpc_lightning.evaluation.ablation.fingerprint import fingerprint
from lpc_lightning.evaluation.ablation.folder import CellFolder, Record, Weights
from lpc_lightning.evaluation.ablation.grid import Cell


@dataclass(frozen=True)
class Planned:
    """A cell of the grid, what is asked of it, and its folder."""

    number: int
    """Its place in the grid."""
    folder: CellFolder
    wanted: Record
    """As it would begin."""

    def is_to_run(self, retry_failed: bool, keep_stale: bool) -> bool:
        """Whether it lacks results that this command should get; settings as of `ablate`."""
        found = self.folder.record()
        if found is None:
            return True
        if found.fingerprint != self.wanted.fingerprint:
            return not (keep_stale and self.folder.is_finished)
        return not self.folder.is_finished and (found.status != "failed" or retry_failed)


def plan(output: Path, cells: Sequence[Cell], weights: Weights) -> list[Planned]:
    """The cells with what is known of them.

    Args:
        output: The ablation's folder.
        cells: All cells of the grid.
        weights: Which weights their results are those of.
    """
    return [
        Planned(
            number,
            CellFolder(output / "cells" / cell.name),
            Record(cell.axes, cell.axes.get("seed"), fingerprint(cell.arguments, weights), cell.arguments),
        )
        for number, cell in enumerate(cells)
    ]
