"""The files `ablation.json`, with properties that all cells of a folder share, and `tuning.json`, with the choices."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.axes import Axis, to_text
from lpc_lightning.evaluation.ablation.grids.grid import Grid
from lpc_lightning.evaluation.ablation.grids.tuning import Choice, Tuning, mean_score
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.files.json_files import write_json

OVERVIEW, TUNING = "ablation.json", "tuning.json"


def write_overview(output: Path, grid: Grid, command: str) -> None:
    """Write a description of the grid. Axis values of earlier commands in the same folder are kept.

    Args:
        output: The ablation's folder.
        grid: The grid.
        command: The command that runs the grid.

    Raises:
        ConfigError: See `check_overview`.
    """
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / "lock"):  # another command may run other values in the same folder
        _update(output / OVERVIEW, grid, command)


def check_overview(output: Path, grid: Grid) -> None:
    """Check that the grid fits those of earlier commands in the same folder.

    Args:
        output: The ablation's folder.
        grid: The grid.

    Raises:
        ConfigError: The folder has a grid with other axes, or a seed would both tune and have results.
    """
    before, names = _earlier_axes(output), [axis.name for axis in grid.axes]
    if before and set(before) != set(names):
        raise ConfigError(
            f"output: found a grid over {', '.join(before)} in {output}, expected one over "
            f"{', '.join(names)}. Use another folder (--output)."
        )
    tuning_seeds = [] if grid.tune is None else [to_text(seed) for seed in grid.tune.seeds]
    seeds = next((axis.values for axis in grid.axes if axis.name == "seed"), ())
    if used := sorted({to_text(seed) for seed in seeds} & _earlier_tuning_seeds(output / TUNING)):
        raise ConfigError(
            f"seed: found {', '.join(used)}, which tuned the results in {output}, expected other seeds, or "
            "another folder (--output): results of a seed that was used for tuning are biased."
        )
    if used := [seed for seed in before.get("seed", []) if to_text(seed) in tuning_seeds]:
        raise ConfigError(
            f"tune.seeds: found {', '.join(map(str, used))}, which the results in {output} have, expected other "
            "seeds, or another folder (--output)."
        )


def _earlier_axes(output: Path) -> dict[str, list[Any]]:
    """Return the axes of earlier commands with their values."""
    path = output / OVERVIEW
    axes: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))["axes"] if path.exists() else {}
    return axes


def _update(path: Path, grid: Grid, command: str) -> None:
    check_overview(path.parent, grid)
    before, tune = _earlier_axes(path.parent), grid.tune
    overview = {
        "name": grid.name,
        "base": [*grid.base, *grid.settings],
        "axes": {axis.name: _values(axis, before.get(axis.name, [])) for axis in grid.axes},
        "tune": None if tune is None else tune.describe(),
        "skip": [dict(combination) for combination in grid.skip],
        "command": command,
        "versions": provenance(),
    }
    write_json(path, overview)


def _earlier_tuning_seeds(path: Path) -> set[str]:
    """Return the seeds of all tunings in a folder, as texts."""
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"] if path.exists() else []
    return {to_text(seed) for group in groups for seed in group["tune"]["seeds"]}


def _values(axis: Axis, earlier_values: list[Any]) -> list[Any]:
    names = {to_text(value) for value in axis.values}  # 1 and 1.0 are equal, and two values
    return [*axis.values, *(value for value in earlier_values if to_text(value) not in names)]


def write_choices(output: Path, tune: Tuning, choices: Sequence[Choice]) -> None:
    """Write the scores of all tuning cells and the chosen values to `tuning.json`.

    Groups of earlier commands in the same folder are kept.

    Args:
        output: The ablation's folder.
        tune: The section `tune` of the grid.
        choices: The tuning of each group.
    """
    path = output / TUNING
    groups = [{"axes": dict(choice.group), "tune": tune.describe(), **_tuned(choice, tune)} for choice in choices]
    with FileLock(output / "lock"):
        before = json.loads(path.read_text(encoding="utf-8"))["groups"] if path.exists() else []
        names = {_name(group) for group in groups}
        content = {"groups": [*groups, *(group for group in before if _name(group) not in names)]}
        if content["groups"] != before:
            write_json(path, content)


def _name(group: Mapping[str, Any]) -> str:
    """Return a text of a group's axes, in which 1 and 1.0 differ."""
    return json.dumps(group["axes"], sort_keys=True)


def _tuned(choice: Choice, tune: Tuning) -> dict[str, Any]:
    values = []
    for value, outcomes in choice.outcomes.items():
        cells = [
            {"seed": seed, **outcome._asdict(), "score": outcome.score if outcome.status == "scored" else None}
            for seed, outcome in zip(tune.seeds, outcomes, strict=True)
        ]
        is_added = value not in tune.axis.values
        values.append({"value": value, "added": is_added, "mean": mean_score(outcomes), "cells": cells})
    return {"value": choice.value, "note": choice.note, "values": values}
