"""Runs of cells, on this machine or on a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lpc_lightning.evaluation.ablation.cells.folder import CELLS, Record, Weights
from lpc_lightning.evaluation.ablation.cells.local import run_locally
from lpc_lightning.evaluation.ablation.cells.process import Job
from lpc_lightning.evaluation.ablation.cells.progress import Progress
from lpc_lightning.evaluation.ablation.cells.ray_cluster import run_on_ray
from lpc_lightning.evaluation.ablation.plan import PlannedCell


@dataclass(frozen=True)
class CellRunner:
    """Settings of how cells run. See `ablate` for their meaning."""

    output: Path
    """The ablation's folder."""
    weights: Weights
    processes: int
    threads: int | None
    remove_checkpoints: bool
    launcher: Literal["local", "ray"]
    cpus: float
    gpus: float
    retries: int
    describe: Callable[[], None]
    """Function that writes `ablation.json`. It is called after the first cell whose attempt is on record: one that ends
    before its first step may leave the folder as it was."""
    tuned_by: str | None = None
    """Metric that scores tuning cells."""

    def run(self, cells: Sequence[PlannedCell], ended: int) -> None:
        """Run cells until each has finished or failed.

        Args:
            cells: The cells.
            ended: Number of other cells of these stages, which have ended in an earlier command, for the message.

        Raises:
            ConfigError: A finished tuning cell has no metric `tuned_by`. The other cells are stopped.
        """
        by_path = {cell.folder.path: cell for cell in cells}
        jobs = self._jobs(cells)
        job_count = "1 cell" if len(jobs) == 1 else f"{len(jobs)} cells"
        folders = sorted({str(job.folder.parent) for job in jobs}) or [str(self.output / CELLS)]
        print(f"{job_count} to run in {' and '.join(folders)}" + (f"; {ended} ended before." if ended else "."))
        if replaced := sum(cell.folder.is_finished for cell in cells):
            those = "1 finished cell has" if replaced == 1 else f"{replaced} finished cells have"
            results = "its" if replaced == 1 else "their"
            print(
                f"{those} other settings, files or code; {results} results will be replaced (--keep_stale keeps them)."
            )
        progress, is_described = Progress(len(jobs)), False

        def on_end(job: Job, record: Record | None) -> None:
            nonlocal is_described
            progress(job, record)
            cell = by_path[job.folder]
            if record is not None and not is_described and cell.has_begun:
                self.describe()
                is_described = True
            if self.tuned_by is not None and cell.folder.is_tuning:
                cell.outcome(self.tuned_by, keep_stale=False)  # a misspelt metric is found after the first cell

        try:
            if self.launcher == "ray":
                run_on_ray(jobs, self.cpus, self.gpus, self.retries, on_end)
            else:
                run_locally(jobs, self.processes, on_end)
        finally:
            progress.close()

    def _jobs(self, cells: Sequence[PlannedCell]) -> list[Job]:
        in_share = torch.get_num_threads() // self.processes if self.launcher == "local" else int(self.cpus)
        threads = self.threads or max(1, in_share)
        directory, environment = Path.cwd(), dict(os.environ)
        return [
            Job(
                cell.folder.path,
                cell.new_record,
                self.weights,
                threads,
                directory,
                environment,
                self.remove_checkpoints,
            )
            for cell in cells
        ]
