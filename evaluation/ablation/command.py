"""A resumable grid of runs (algorithm, latent, noise, seed ...), where each run is a separate fit."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from lpc_lightning.cli.function_command import run_function
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.cell_runner import CellRunner
from lpc_lightning.evaluation.ablation.cells.folder import Weights
from lpc_lightning.evaluation.ablation.grids.grid import Grid, read_grid
from lpc_lightning.evaluation.ablation.overview import OVERVIEW, check_overview, write_overview
from lpc_lightning.evaluation.ablation.plan import Plan, PlannedCell
from lpc_lightning.evaluation.ablation.slurm import array_script
from lpc_lightning.evaluation.ablation.stages import Stages
from lpc_lightning.files.output_paths import check_folder


def main(arguments: list[str]) -> None:
    """Run the command.

    The exit code is 1 if a cell failed. After an interruption it is 130, or 143 with `--cell`.
    """
    single = any(argument.partition("=")[0] == "--cell" for argument in arguments)
    try:
        is_complete = run_function(ablate, arguments[1:], arguments[0])
    except KeyboardInterrupt:
        print("Stopped. Run the same command again to continue.", file=sys.stderr)
        sys.exit(143 if single else 130)
    if not is_complete:
        sys.exit(1)


def ablate(
    grid: list[str],
    output: str | None = None,
    processes: int = 1,
    threads: int | None = None,
    weights: Weights = "last",
    retry_failed: bool = False,
    keep_stale: bool = False,
    remove_checkpoints: bool = False,
    launcher: Literal["local", "ray"] = "local",
    cpus: float = 1.0,
    gpus: float = 0.0,
    retries: int = 2,
    cell: int | None = None,
    print_array: bool = False,
) -> bool:
    """Run every cell of a grid: a fit in its own folder and process, followed by validation and test.

    A grid is a YAML file with the arguments of `lpc-lightning fit` that all cells share, and axes with values (see
    configs/ablation/). `extends: FILE` in it names a grid file of which it states a change: mappings are merged, lists
    replace lists, null removes a key. After the file, `AXIS=VALUE,VALUE` replaces the values of an axis, and
    `SETTING=VALUE` (such as trainer.max_steps=20) sets a setting of all cells, unless an axis sets it.

    A grid may tune an axis, such as the learning rate (`tune`; see configs/ablation/noise_tiny.yaml). Then all
    combinations of the other axes are first fitted at the same values of that axis, under tuning seeds. Validation
    chooses a value for each combination. If a best value is the smallest or the largest one, a further value is tried
    for all combinations of this command, but not for those of others. The cells of the result have other seeds and run
    at the chosen values. `AXIS=VALUE,VALUE` and `tune.seeds=VALUE,VALUE` change the values and the tuning seeds. A
    single value is used without tuning.

    If the command runs again, it skips finished cells and resumes interrupted cells from their checkpoints. Cells run
    from the start if their settings, files or code have changed. Earlier results stay until the new attempt has made a
    step. If a cell fails, its error is recorded, and the other cells run. Tokens and reference log-probabilities that
    cells share are computed once.

    Args:
        grid: The grid's file, followed by changes: noise=0,0.3 seed=1,2 trainer.max_steps=20.
        output: Folder for the cells. null: runs/ablation/NAME, where NAME is the name of the grid's file.
        processes: Number of cells that run at the same time on this machine.
        threads: Number of threads per cell. null: this machine's processors divided by `processes`; with Ray, `cpus`.
        weights: Weights to validate and test: those of the `last` step, or those of the `best` checkpoint.
        retry_failed: Run failed cells again.
        keep_stale: Skip finished cells even if their settings, files or code have changed.
        remove_checkpoints: Remove the checkpoints of each cell when it has finished, and those of cells that earlier
            commands have finished. With the state of the optimizer, two checkpoints of a policy of 135M parameters take
            3 GB. Interrupted, failed and stale cells keep theirs.
        launcher: `local`: processes on this machine; `ray`: tasks on an existing Ray cluster (extra `ray`).
        cpus: Number of CPUs per cell, with Ray.
        gpus: Number of GPUs per cell, with Ray. Cells share a GPU if it is below 1.
        retries: Number of times that Ray resumes a cell after its process or node died.
        cell: Run only the cell with this number, for a Slurm array.
        print_array: Print a Slurm script that runs the cells as an array. Run no cells. With a tuned axis, print and
            submit it again when its cells have ended, until no cell is left.

    Returns:
        True if all selected cells are finished.

    Raises:
        ConfigError: The file is not a grid, or a setting is invalid. Raised before anything runs.
    """
    if processes < 1:
        raise ConfigError(f"processes: found {processes}, expected at least 1.")
    changed_grid = read_grid(Path(grid[0])).with_changes(grid[1:])
    folder = Path(output or f"runs/ablation/{changed_grid.name}").absolute()
    check_folder(folder, "output")
    stages = Stages(folder, changed_grid, weights, retry_failed, keep_stale)
    cells = stages.plan().cells
    if cell is not None and not 0 <= cell < len(cells):
        raise ConfigError(f"cell: found {cell}, expected a number from 0 to {len(cells) - 1}.")
    command = ["lpc-lightning", "ablate", *grid]
    if print_array:
        flags = {"retry_failed": retry_failed, "keep_stale": keep_stale, "remove_checkpoints": remove_checkpoints}
        command += [f"--output={folder}", f"--weights={weights}"]
        command += [] if threads is None else [f"--threads={threads}"]
        command += [f"--{name}" for name, is_set in flags.items() if is_set]
        _print_array(changed_grid.name, command, stages.to_run(cells if cell is None else [cells[cell]]))
        return True
    check_overview(folder, changed_grid)
    describe = partial(write_overview, folder, changed_grid, shlex.join(command))
    if not (folder / OVERVIEW).exists():
        describe()
    tuned_by = None if changed_grid.tune is None else changed_grid.tune.by
    runner = CellRunner(
        folder, weights, processes, threads, remove_checkpoints, launcher, cpus, gpus, retries, describe, tuned_by
    )
    try:
        stages.run(runner.run, cell)
    finally:
        planned = stages.plan()
        _print_summary(planned, changed_grid, folder, keep_stale)
    selected = planned.cells if cell is None else [planned.cells[cell]]
    if remove_checkpoints:
        for each in selected:
            if each.folder.is_finished and each.has_begun:  # of earlier commands, too
                each.folder.remove_checkpoints()
    is_complete = planned.is_complete or cell is not None
    return is_complete and all(map(stages.is_finished, selected))


def _print_array(name: str, command: Sequence[str], cells: Sequence[PlannedCell]) -> None:
    if cells:
        print(array_script(name, command, [cell.number for cell in cells]), end="")
    else:
        print("No cell is left to run, so there is no array to submit.", file=sys.stderr)


def _print_summary(planned: Plan, grid: Grid, folder: Path, keep_stale: bool) -> None:
    """Print the chosen values, the number of cells by state, and the next command."""
    if grid.tune is not None and planned.choices:
        print(f"{grid.tune.axis.name}, tuned by {grid.tune.by} over the seeds {', '.join(map(str, grid.tune.seeds))}:")
        for choice in planned.choices:
            name = ", ".join(f"{axis}={value}" for axis, value in choice.group.items())
            print(f"  {name}: {choice.value}" + (f" ({choice.note})" if choice.note else ""))
    elif not planned.is_complete:
        print("The tuning is not complete. Run the same command again to continue.")
    states = [(each, each.state(keep_stale)) for each in planned.cells]
    counts = Counter(state for _, state in states)
    print(f"{', '.join(f'{number} {state}' for state, number in counts.items())}: {folder}")
    if counts["failed"]:
        print("Failed cells (--retry_failed runs them again; each has a log.txt):")
        for each, state in states:
            if state == "failed" and (record := each.folder.record()) is not None:
                cause = (record.error or "no cause was recorded").splitlines()[-1]
                print(f"  {each.folder.path.name}: {cause}")
    if counts["finished"]:
        print(f"Tables and plots: lpc-lightning report {os.path.relpath(folder)}")
