"""Read ablations that `lpc-lightning ablate` has written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import reduce
from itertools import product
from operator import add
from pathlib import Path
from typing import Any

from lpc_lightning.data import DataError
from lpc_lightning.evaluation.ablation.grids.axes import matches
from lpc_lightning.evaluation.benchmarks.results import RESULTS
from lpc_lightning.evaluation.report.runs.arguments import PlacedSettings, place_arguments
from lpc_lightning.evaluation.report.runs.fit import read_run
from lpc_lightning.evaluation.report.runs.inputs import Inputs
from lpc_lightning.evaluation.report.runs.records import (
    FINISHED,
    MISSING,
    Loaded,
    RunProvenance,
    RunRecord,
    numeric_metrics,
)
from lpc_lightning.evaluation.report.runs.settings import SHARES, WEIGHTS, Value, as_share, as_value
from lpc_lightning.evaluation.report.runs.tuning import read_tunings

ABLATION, CELL, CELLS = "ablation.json", "cell.json", "cells"
SCORE_PREFIXES = ("val/", "test/", "lm_eval/")
"""Prefixes of metrics that depend on the weights at their time."""


def load_ablation(folder: Path) -> Loaded:
    """Read `ablation.json` and the cells under `cells/`. A cell of the grid without a folder becomes a record, too."""
    ablation = json.loads((folder / ABLATION).read_text(encoding="utf-8"))
    cells = reduce(add, (load_cell(path.parent) for path in sorted(folder.glob(f"{CELLS}/*/{CELL}"))), Loaded())
    facts = {"base": shlex.join(ablation["base"]), **ablation["versions"], "folder": str(folder)}
    origin = RunProvenance(ablation["name"], ablation["command"], facts)
    grid = ablation["axes"]
    shares = _share_axes(argument for record in cells.records for argument in record.arguments)
    axes = {
        name: tuple(map(as_share if name in shares else as_value, values))
        for name, values in grid.items()
        if name != "seed"
    }
    missing = tuple(_missing_cells(grid, ablation.get("skip", ()), cells.records, shares))
    missing = tuple(replace(record, grid=str(folder), grid_axes=tuple(grid)) for record in missing)
    tunings = tuple(replace(each, axes=_read_axes(each.axes, shares)) for each in read_tunings(folder))
    return Loaded(axes=axes, origins=(origin,), tunings=tunings) + cells + Loaded(records=missing)


def _share_axes(arguments: Iterable[PlacedSettings]) -> set[str]:
    """Return the axes that set one of `SHARES`."""
    own = (
        argument for argument in arguments if argument.place == "axis" and not set(SHARES).isdisjoint(argument.names)
    )
    return {axis for argument in own for axis in argument.axes}


def _read_axes(axes: Mapping[str, Any], shares: Set[str]) -> dict[str, Value]:
    """Convert values by axis. Those of `shares` are values of one of `SHARES`."""
    return {axis: as_share(value) if axis in shares else as_value(value) for axis, value in axes.items()}


def _missing_cells(
    grid: Mapping[str, Sequence[Any]], skip: Sequence[Mapping[str, Any]], cells: Sequence[RunRecord], shares: Set[str]
) -> Iterator[RunRecord]:
    """Yield a record for each cell of the grid that has no folder and is not skipped."""
    existing = {(frozenset(cell.axes.items()), cell.seed if "seed" in grid else None) for cell in cells}
    for values in product(*grid.values()):
        value_by_axis = dict(zip(grid, values, strict=True))
        axes = _read_axes(value_by_axis, shares)
        name = ",".join(f"{axis}={value}" for axis, value in axes.items())
        seed = axes.pop("seed", None)
        if (frozenset(axes.items()), seed) in existing or any(matches(value_by_axis, part) for part in skip):
            continue
        yield RunRecord(name, axes, seed, MISSING, "This cell of the grid was never started.")


def load_cell(folder: Path) -> Loaded:
    """Read `cell.json`, the logs of the cell's run, `results.json` if it exists, and what is known of the grid.

    The seed is the cell's value on the axis `seed`, or that of its run if the grid has no such axis.

    Raises:
        DataError: An earlier version has written the cell.
    """
    cell = json.loads((folder / CELL).read_text(encoding="utf-8"))
    if missing := {"places", "tuned", "weights"} - cell.keys():
        raise DataError(
            f"{folder / CELL}: found no entry {', '.join(sorted(missing))}: an earlier version has written the cell. "
            "Remove its folder, or name the folders of the other cells one by one."
        )
    run = folder / "run"
    logged = read_run(run)
    arguments = tuple(place_arguments(cell, logged.settings))
    shares = _share_axes(arguments)
    axes = _read_axes(cell["axes"], shares)
    seed = axes.pop("seed", None)
    grid = folder.parent.parent
    tuned = {axis: as_value(value) for axis, value in cell["tuned"].items()}
    # A cell at another value than the chosen one ran later at a value that was set by hand.
    chosen = (each for each in read_tunings(grid) if tuned == {each.axis: each.value})
    tune = next((each.section for each in chosen if _read_axes(each.axes, shares) == axes), "none")
    settings = {**logged.settings, WEIGHTS: cell["weights"], "tune": tune} if logged.settings else {}
    record = replace(
        logged,
        name=folder.name,
        axes=axes,
        seed=logged.seed if seed is None else seed,
        settings=settings,
        grid=str(grid),
        tuned=tuned,
        status=cell["status"],
        error=cell.get("error"),
        folder=run,
        seconds=cell.get("seconds"),
        peak_bytes=cell.get("peak_bytes"),
        grid_axes=tuple(cell["axes"]),
        arguments=arguments,
        inputs=Inputs(
            f"{grid.name}/{folder.name}", cell.get("started", 0.0), cell.get("files", {}), cell.get("code", "")
        ),
    )
    if (folder / RESULTS).is_file():
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        metrics = {**_of_weights(cell["weights"], logged.metrics), **numeric_metrics(results["metrics"])}
        parameters = {name: int(count) for name, count in (results.get("parameters") or {}).items()}
        record = replace(record, metrics=metrics, parameters=parameters)
    elif cell["status"] == FINISHED:
        record = replace(record, status="failed", error=f"The cell is finished, but {RESULTS} is missing.")
    return Loaded(records=(record,))


def _of_weights(weights: str, logged: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that a fit has logged of these weights. Scores of a fit are those of its last weights."""
    return {name: value for name, value in logged.items() if weights == "last" or not name.startswith(SCORE_PREFIXES)}
