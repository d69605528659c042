"""Ablations as `lpc-lightning ablate` leaves them."""

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

from lpc_lightning.evaluation.benchmarks.results import RESULTS
from lpc_lightning.evaluation.report.runs.fit import read_run
from lpc_lightning.evaluation.report.runs.records import (
    FINISHED,
    MISSING,
    Loaded,
    RunProvenance,
    RunRecord,
    finite,
    split_seed,
)
from lpc_lightning.evaluation.report.runs.settings import Value, as_value

ABLATION, CELL = "ablation.json", "cell.json"


def load_ablation(folder: Path) -> Loaded:
    """`ablation.json` and the cells under `cells/`. A cell of the grid that has no folder is a record too."""
    about = json.loads((folder / ABLATION).read_text(encoding="utf-8"))
    grid = {name: tuple(as_value(value) for value in values) for name, values in about["axes"].items()}
    cells = reduce(add, (load_cell(path.parent) for path in sorted(folder.glob(f"cells/*/{CELL}"))), Loaded())
    facts = {"base": shlex.join(about["base"]), **about["versions"], "folder": str(folder)}
    making = RunProvenance(about["name"], about["command"], facts)
    axes = {name: values for name, values in grid.items() if name != "seed"}
    missing = tuple(_missing(grid, about.get("skip", ()), cells.records))
    return Loaded(axes=axes, makings=(making,)) + cells + Loaded(records=missing)


def _missing(
    grid: Mapping[str, Sequence[Value]], skip: Sequence[Mapping[str, Any]], cells: Sequence[RunRecord]
) -> Iterator[RunRecord]:
    """Cells of the grid that are not there, but for combinations that it leaves out."""
    there = {(frozenset(cell.axes.items()), cell.seed) for cell in cells}
    for values in product(*grid.values()):
        cell = dict(zip(grid, values, strict=True))
        axes, seed = split_seed(cell)
        if (frozenset(axes.items()), seed) in there or any(_is_at(cell, left_out) for left_out in skip):
            continue
        name = ",".join(f"{axis}={value}" for axis, value in cell.items())
        yield RunRecord(name, axes, seed, MISSING, "This cell of the grid was never begun.")


def _is_at(cell: Mapping[str, Value], combination: Mapping[str, Any]) -> bool:
    """Whether a cell is in a combination of values, or of lists of values, on some of the axes."""
    several = {name: wanted if isinstance(wanted, list) else [wanted] for name, wanted in combination.items()}
    return all(cell[name] in map(as_value, wanted) for name, wanted in several.items())


def load_cell(folder: Path) -> Loaded:
    """`cell.json`, `results.json` where the cell has come so far, and what its run has logged."""
    cell = json.loads((folder / CELL).read_text(encoding="utf-8"))
    axes, seed = split_seed(cell["axes"])
    run = folder / "run"
    logged = read_run(run)
    record = replace(
        logged,
        name=folder.name,
        axes=axes,
        seed=seed,
        own_axes=True,
        status=cell["status"],
        error=cell.get("error"),
        place=run,
        seconds=cell.get("seconds"),
        peak_bytes=cell.get("peak_bytes"),
    )
    if (folder / RESULTS).is_file():
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        metrics = {**logged.metrics, **finite(results["metrics"])}
        parameters = {name: int(count) for name, count in (results.get("parameters") or {}).items()}
        record = replace(record, metrics=metrics, parameters=parameters)
    elif cell["status"] == FINISHED:
        record = replace(record, status="failed", error=f"The cell is finished, but has no {RESULTS}.")
    return Loaded(records=(record,))
