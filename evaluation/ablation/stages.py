"""The stages of a grid: tuning cells, more of them at wider ranges, and the cells of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lpc_lightning.evaluation.ablation.cells.folder import Weights
from lpc_lightning.evaluation.ablation.grids.grid import Grid
from lpc_lightning.evaluation.ablation.overview import write_choices
from lpc_lightning.evaluation.ablation.plan import Plan, PlannedCell, make_plan


@dataclass(frozen=True)
class Stages:
    """The cells of a grid in a folder, stage by stage."""

    output: Path
    """The ablation's folder."""
    grid: Grid
    weights: Weights
    retry_failed: bool = False
    keep_stale: bool = False

    def plan(self) -> Plan:
        """Return the cells that are known now."""
        return make_plan(self.output, self.grid, self.weights, self.keep_stale)

    def to_run(self, cells: Sequence[PlannedCell]) -> list[PlannedCell]:
        """Return those of the cells that have to run now: tuning cells first, whose outcome may change the others."""
        waiting = self.waiting(cells)
        return [cell for cell in waiting if cell.folder.is_tuning] or waiting

    def waiting(self, cells: Sequence[PlannedCell]) -> list[PlannedCell]:
        """Return those of the cells that have to run."""
        return [cell for cell in cells if cell.needs_run(self.retry_failed, self.keep_stale)]

    def is_finished(self, cell: PlannedCell) -> bool:
        """True if a cell is finished and does not have to run again, or has diverged while tuning."""
        has_ended = cell.folder.is_finished or cell.is_diverged_tuning
        return has_ended and not cell.needs_run(retry_failed=False, keep_stale=self.keep_stale)

    def run(self, run_cells: Callable[[Sequence[PlannedCell], int], None], number: int | None = None) -> Plan:
        """Run the cells of all stages.

        After each stage, the values of the tuned axis are chosen from the results. No cell runs twice.

        Args:
            run_cells: Function that runs some cells. Its second argument is the number of other cells of the stage,
                which are finished or have failed.
            number: Number of the only cell to run. None: all cells.

        Returns:
            The cells after the last stage.
        """
        attempted = set[Path]()
        while True:
            plan = self.plan()
            if self.grid.tune is not None and plan.choices:
                write_choices(self.output, self.grid.tune, plan.choices)
            selected = plan.cells if number is None else [plan.cells[number]]
            new = [cell for cell in selected if cell.folder.path not in attempted]
            to_run = self.to_run(new)
            if attempted and not to_run:
                return plan
            run_cells(to_run, len(new) - len(self.waiting(new)))
            if not to_run:
                return plan
            attempted |= {cell.folder.path for cell in to_run}
