"""The cells of a grid with their folders, and the decision which of them to run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.cells.folder import CELLS, TUNING_CELLS, CellFolder, Record, Weights
from lpc_lightning.evaluation.ablation.fingerprint import cell_fingerprint, code_version, digests_in_arguments
from lpc_lightning.evaluation.ablation.grids.grid import Cell, Grid
from lpc_lightning.evaluation.ablation.grids.tuning import Choice, Outcome, added_values, choose

STALE = "stale (run again)"
"""State of a cell whose settings, files or code have changed since it ended, or whose results were removed."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell of the grid, with its folder and the record of a new run."""

    number: int
    """Index of the cell in the grid: first the tuning cells in the order in which they are added, then the others."""
    folder: CellFolder
    new_record: Record
    """The record that a new run would start with."""

    @property
    def has_begun(self) -> bool:
        """True if an attempt with the present settings, files and code is on record."""
        record = self.folder.record()
        return record is not None and record.fingerprint == self.new_record.fingerprint

    def needs_run(self, retry_failed: bool, keep_stale: bool) -> bool:
        """Return True if the cell must run. See `ablate` for the settings."""
        record = self.folder.record()
        if record is None:
            return True
        if record.fingerprint != self.new_record.fingerprint:
            return not (keep_stale and self.folder.is_finished)
        return not self.folder.is_finished and (record.status != "failed" or retry_failed)

    def state(self, keep_stale: bool) -> str:
        """Return the status of the cell. If it has ended but must run again, the status is `STALE`."""
        record = self.folder.record()
        if record is None:
            return "not run"
        has_ended = record.status in ("finished", "failed")
        return STALE if has_ended and self.needs_run(retry_failed=False, keep_stale=keep_stale) else record.status

    @property
    def is_diverged_tuning(self) -> bool:
        """True for a tuning cell that has diverged. Its value is not chosen, and it does not have to run again."""
        record = self.folder.record()
        return self.folder.is_tuning and record is not None and record.diverged

    def outcome(self, by: str, keep_stale: bool) -> Outcome:
        """Return the outcome of a tuning cell.

        Args:
            by: Metric that scores the cell.
            keep_stale: Whether results count if settings, files or code have changed since.

        Raises:
            ConfigError: The finished cell has no such metric.
        """
        name = self.folder.path.name
        if self.needs_run(retry_failed=False, keep_stale=keep_stale):
            return Outcome(name, "pending")
        record = self.folder.record()
        if record is not None and record.status == "failed":
            return Outcome(name, "diverged" if record.diverged else "failed")
        metrics: dict[str, Any] = json.loads(self.folder.results.read_text(encoding="utf-8"))["metrics"]
        if by not in metrics:
            available = ", ".join(sorted(metric for metric in metrics if metric.startswith("val/")))
            raise ConfigError(
                f"tune.by: found {by}, which {self.folder.path} has not logged, expected one of {available}."
            )
        score = metrics[by]
        is_number = score is not None and math.isfinite(score)
        return Outcome(name, "scored", score) if is_number else Outcome(name, "diverged")


@dataclass(frozen=True)
class Plan:
    """The cells of a grid, as far as they are known."""

    cells: Sequence[PlannedCell]
    choices: Sequence[Choice] = ()
    """The tuning of each group. Empty while tuning cells have to run, or if nothing is tuned."""
    is_complete: bool = True
    """True if the cells of the result are known for all groups."""


def make_plan(output: Path, grid: Grid, weights: Weights, keep_stale: bool = False) -> Plan:
    """Return the cells of a grid.

    With a tuned axis, these are the tuning cells until all of them have ended. Then come the cells of the result, for
    each group with a chosen value. If the best value of a group is at an edge, values are added for all groups of the
    grid alike. Groups that it leaves out, such as arms of other commands, get none.

    Args:
        output: The ablation's folder.
        grid: The grid.
        weights: Weights to validate and test.
        keep_stale: Whether finished cells count if settings, files or code have changed since.
    """
    if grid.tune is None:
        return Plan(plan_cells(output, grid.cells(), weights))
    tune = grid.tune
    if len(tune.axis.values) == 1:
        cells = [grid.at(cell, tune.axis.values[0]) for cell in grid.cells()]
        return Plan(plan_cells(output, cells, weights))
    planned, choices = _tune(grid, partial(plan_cells, output, weights=weights, folder=TUNING_CELLS), keep_stale)
    chosen = {_text(choice.group): choice.value for choice in choices}
    values = [(cell, chosen.get(_key(cell))) for cell in grid.cells()]
    results = [grid.at(cell, value) for cell, value in values if value is not None]
    planned += plan_cells(output, results, weights, len(planned))
    return Plan(planned, choices, is_complete=all(value is not None for _, value in values))


def _tune(
    grid: Grid, plan: Callable[..., list[PlannedCell]], keep_stale: bool
) -> tuple[list[PlannedCell], list[Choice]]:
    """Return the tuning cells, and the choices if all of these cells have ended."""
    assert grid.tune is not None
    tune, planned = grid.tune, list[PlannedCell]()
    groups = {_key(cell): cell.group for cell in grid.cells()}
    outcomes: dict[str, dict[float, list[Outcome]]] = {key: {} for key in groups}
    new, widenings = list[float](tune.axis.values), 0
    while True:
        for value in new:
            cells = [cell for cell in grid.tuning_cells(value) if _key(cell, tune.axis.name) in groups]
            added = plan(cells, start=len(planned))
            planned += added
            for cell, each in zip(cells, added, strict=True):
                outcomes[_key(cell, tune.axis.name)].setdefault(value, []).append(each.outcome(tune.by, keep_stale))
        flat = [outcome for by_value in outcomes.values() for each in by_value.values() for outcome in each]
        if any(outcome.status == "pending" for outcome in flat):
            return planned, []
        choices = [choose(groups[key], by_value, tune.mode) for key, by_value in outcomes.items()]
        new = added_values(choices) if widenings < tune.widen else []
        widenings += 1
        if not new:
            return planned, choices


def _key(cell: Cell, tuned: str | None = None) -> str:
    """Return a key of the cell's group, without the tuned axis."""
    return _text({axis: value for axis, value in cell.group.items() if axis != tuned})


def _text(group: Mapping[str, Any]) -> str:
    return json.dumps(dict(group))


def plan_cells(
    output: Path, cells: Sequence[Cell], weights: Weights, start: int = 0, folder: str = CELLS
) -> list[PlannedCell]:
    """Return cells with their folders and new records.

    Args:
        output: The ablation's folder.
        cells: The cells.
        weights: Weights to validate and test.
        start: Number of the first cell.
        folder: Folder of the cells' folders, in `output`.
    """
    planned = [
        PlannedCell(number, CellFolder(output / folder / cell.name), _new_record(cell, weights))
        for number, cell in enumerate(cells, start)
    ]
    for each in planned:
        each.folder.recover()
    return planned


def _new_record(cell: Cell, weights: Weights) -> Record:
    files, code = digests_in_arguments(cell.arguments), code_version()
    return Record(
        cell.axes,
        cell.axes.get("seed"),
        cell_fingerprint(cell.arguments, weights, files, code),
        cell.arguments,
        tuple(placed.place for placed in cell.placed),
        weights,
        cell.tuned,
        files,
        code,
    )
