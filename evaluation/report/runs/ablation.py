"""Read ablations that `lpc-lightning ablate` has written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import product
from operator import add
from pathlib import Path
from typing import Any

from lpc_lightning.data import DataError
from lpc_lightning.evaluation.ablation.grids.axes import matches
from lpc_lightning.evaluation.benchmarks.results import RESULTS
from lpc_lightning.evaluation.report.runs.arguments import place_arguments
from lpc_lightning.evaluation.report.runs.fit import read_run
from lpc_lightning.evaluation.report.runs.inputs import Inputs
from lpc_lightning.evaluation.report.runs.records import (
    FINISHED,
    MISSING,
    Loaded,
    RunProvenance,
    RunRecord,
    numeric_metrics,
    split_seed,
)
from lpc_lightning.evaluation.report.runs.settings import WEIGHTS, as_value
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
    axes = {name: tuple(map(as_value, values)) for name, values in grid.items() if name != "seed"}
    missing = tuple(_missing_cells(grid, ablation.get("skip", ()), cells.records))
    missing = tuple(replace(record, grid=str(folder), grid_axes=tuple(grid)) for record in missing)
    return Loaded(axes=axes, origins=(origin,), tunings=tuple(read_tunings(folder))) + cells + Loaded(records=missing)


def _missing_cells(
    grid: Mapping[str, Sequence[Any]], skip: Sequence[Mapping[str, Any]], cells: Sequence[RunRecord]
) -> Iterator[RunRecord]:
    """Yield a record for each cell of the grid that has no folder and is not skipped."""
    existing = {(frozenset(cell.axes.items()), cell.seed if "seed" in grid else None) for cell in cells}
    for values in product(*grid.values()):
        value_by_axis = dict(zip(grid, values, strict=True))
        cell = {axis: as_value(value) for axis, value in value_by_axis.items()}
        axes, seed = split_seed(cell)
        if (frozenset(axes.items()), seed) in existing or any(matches(value_by_axis, part) for part in skip):
            continue
        name = ",".join(f"{axis}={value}" for axis, value in cell.items())
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
    axes, seed = split_seed(cell["axes"])
    run = folder / "run"
    logged = read_run(run)
    grid = folder.parent.parent
    tuned = {axis: as_value(value) for axis, value in cell["tuned"].items()}
    # A cell at another value than the chosen one ran later at a value that was set by hand.
    sections = (each.section for each in read_tunings(grid) if each.axes == axes and tuned == {each.axis: each.value})
    tune = next(sections, "none")
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
        arguments=tuple(place_arguments(cell, logged.settings)),
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
