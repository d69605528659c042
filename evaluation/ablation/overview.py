"""The file `ablation.json`: properties that all cells of a folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.folder import write_json
from lpc_lightning.evaluation.ablation.grid import Axis, Grid
from lpc_lightning.evaluation.provenance import provenance


def write_overview(output: Path, grid: Grid, command: str) -> None:
    """Write a description of the grid. Axis values of earlier commands in the same folder are kept.

    Args:
        output: The ablation's folder.
        grid: The grid.
        command: The command that runs the grid.

    Raises:
        ConfigError: The folder has a grid with other axes.
    """
    path = output / "ablation.json"
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / "lock"):  # another command may run other values in the same folder
        _update(path, grid, command)


def _update(path: Path, grid: Grid, command: str) -> None:
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"axes": {}}
    names = [axis.name for axis in grid.axes]
    if before["axes"] and set(before["axes"]) != set(names):
        raise ConfigError(
            f"output: found a grid over {', '.join(before['axes'])} in {path.parent}, expected one over "
            f"{', '.join(names)}. Use another folder (--output)."
        )
    overview = {
        "name": grid.name,
        "base": [*grid.base, *grid.settings],
        "axes": {axis.name: _values(axis, before["axes"].get(axis.name, [])) for axis in grid.axes},
        "skip": [dict(combination) for combination in grid.skip],
        "command": command,
        "versions": provenance(),
    }
    write_json(path, overview)


def _values(axis: Axis, earlier_values: list[Any]) -> list[Any]:
    return [*axis.values, *(value for value in earlier_values if value not in axis.values)]
