"""A grid of runs (algorithm, latent, noise, seed ...), each a fit of its own, resumable."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.folder import Weights
from lpc_lightning.evaluation.ablation.grid import read_grid
from lpc_lightning.evaluation.ablation.local import run_locally
from lpc_lightning.evaluation.ablation.overview import write_overview
from lpc_lightning.evaluation.ablation.plan import Planned, plan
from lpc_lightning.evaluation.ablation.process import Job
from lpc_lightning.evaluation.ablation.progress import Progress
from lpc_lightning.evaluation.ablation.ray_cluster import run_on_ray
from lpc_lightning.evaluation.ablation.slurm import array_script
from lpc_lightning.function_command import run_function


def main(arguments: list[str]) -> None:
    """Run the command. Its exit code is 1 where a cell has failed, 130 where it was stopped (143 for a single cell)."""
    single = any(argument.partition("=")[0] == "--cell" for argument in arguments)
    try:
        fine = run_function(ablate, arguments[1:], arguments[0])
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(143 if single else 130)
    if not fine:
        sys.exit(1)


def ablate(
    grid: list[str],
    output: str | None = None,
    processes: int = 1,
    threads: int | None = None,
    weights: Weights = "last",
    retry_failed: bool = False,
    keep_stale: bool = False,
    launcher: Literal["local", "ray"] = "local",
    cpus: float = 1.0,
    gpus: float = 0.0,
    retries: int = 2,
    cell: int | None = None,
    print_array: bool = False,
) -> bool:
    """Run every cell of a grid: a fit in a folder and a process of its own, then its final validation and test.

    A grid is a YAML file: the arguments of `lpc-lightning fit` that all cells share, and axes with values (see
    configs/ablation/). `AXIS=VALUE,VALUE` behind the file takes other values of an axis, `SETTING=VALUE` (such as
    trainer.max_steps=20) sets something for all cells.

    Given again, the command leaves finished cells alone and takes up those that were stopped or killed from their
    checkpoints; cells whose settings, files or code have changed since run anew. A cell that fails is recorded with its
    error, and the others go on. What cells share, tokens and the reference's log-probabilities, is worked out once.

    Args:
        grid: The grid's file, and behind it changes: noise=0,0.3 seed=1,2 trainer.max_steps=20.
        output: Folder for the cells. null: runs/ablation/NAME, by the grid's file.
        processes: Cells at a time on this machine.
        threads: Of each cell. null: this machine's processors divided by `processes`; under Ray, `cpus`.
        weights: Which weights the results are those of: of the `last` step, or of the `best` checkpoint.
        retry_failed: Run cells again that have failed.
        keep_stale: Leave finished cells alone whose settings, files or code have changed since.
        launcher: `local`: processes of this machine; `ray`: tasks on a Ray cluster that is there (pip install ray).
        cpus: CPUs of a cell, under Ray.
        gpus: GPUs of a cell, under Ray; below 1, cells share one.
        retries: How often Ray takes up a cell again whose process or node dies.
        cell: Run the cell of this number alone, as in a Slurm array.
        print_array: Print a Slurm script that runs the cells as an array, and run nothing.

    Returns:
        Whether all cells that ran, or were to run, are finished.

    Raises:
        ConfigError: The file is no grid, or a setting means nothing; told before anything runs.
    """
    if processes < 1:
        raise ConfigError(f"processes: found {processes}, expected at least 1.")
    wanted = read_grid(Path(grid[0])).changed(grid[1:])
    folder = Path(output or f"runs/ablation/{wanted.name}").absolute()
    planned = plan(folder, wanted.cells(), weights)
    if cell is not None and not 0 <= cell < len(planned):
        raise ConfigError(f"cell: found {cell}, expected a number from 0 to {len(planned) - 1}.")
    to_run = [each for each in planned if cell in (None, each.number) and each.is_to_run(retry_failed, keep_stale)]
    if print_array:
        command = ["lpc-lightning", "ablate", *grid, f"--output={folder}", f"--weights={weights}"]
        print(array_script(wanted.name, command, [each.number for each in to_run]), end="")
        return True
    write_overview(folder, wanted, shlex.join(["lpc-lightning", "ablate", *grid]))
    share = max(1, torch.get_num_threads() // processes) if launcher == "local" else max(1, int(cpus))
    here, environment = Path.cwd(), dict(os.environ)
    jobs = [Job(each.folder.path, each.wanted, weights, threads or share, here, environment) for each in to_run]
    left = len(planned if cell is None else [cell]) - len(jobs)
    to_go = "1 cell" if len(jobs) == 1 else f"{len(jobs)} cells"
    print(f"{to_go} to run in {folder / 'cells'}" + (f", {left} left as they are." if left else "."))
    progress = Progress(len(jobs))
    try:
        if launcher == "ray":
            run_on_ray(jobs, cpus, gpus, retries, progress)
        else:
            run_locally(jobs, processes, progress)
    finally:
        progress.close()
        _tell(planned, folder)
    return all(each.folder.is_finished for each in planned if cell in (None, each.number))


def _tell(planned: Sequence[Planned], folder: Path) -> None:
    """Say what there is now, and what to do with it."""
    records = [each.folder.record() for each in planned]
    counts = Counter("not run" if record is None else record.status for record in records)
    print(f"{', '.join(f'{number} {status}' for status, number in counts.items())}: {folder}")
    if counts["failed"]:
        print("Failed cells: see error in their cell.json and their log.txt; --retry-failed runs them again.")
    if counts["finished"]:
        print(f"Tables and plots: lpc-lightning report {os.path.relpath(folder)}")
