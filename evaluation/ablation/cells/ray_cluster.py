"""Execution of cells on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder, Record
from lpc_lightning.evaluation.ablation.cells.local import OnCellEnd
from lpc_lightning.evaluation.ablation.cells.process import CellProcess, Job


class CellStoppedError(Exception):
    """Raised when a cell's process was killed. A retry resumes from the cell's checkpoint."""


def run_on_ray(jobs: Sequence[Job], cpus: float, gpus: float, retries: int, on_end: OnCellEnd) -> None:
    """Run cells as tasks of an existing Ray cluster: that of `RAY_ADDRESS`, or one on this machine.

    Every node needs this project installed. Output folder, data and caches must have the same paths on every node.

    Args:
        jobs: The cells.
        cpus: Number of CPUs that Ray reserves per cell.
        gpus: Number of GPUs that Ray reserves per cell. Cells share a GPU if it is below 1.
        retries: Number of times that a cell is resumed after its process or node died.
        on_end: Function that is called after each cell.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "launcher: found ray, which is not installed, expected local or an installed ray. Run "
            "`pip install -c constraints.txt -e '.[ray]'`."
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            raise ConfigError(
                "launcher: found ray and no cluster, expected a running cluster. Start one (`ray start --head`), or "
                "set RAY_ADDRESS."
            ) from error
    options: Any = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries, "retry_exceptions": [CellStoppedError]}
    remote: Any = ray.remote
    task = remote(**options)(_task)
    # environment=None: Ray selects a cell's GPUs by variables in the environment of its own process.
    pending = {task.remote(replace(job, environment=None)): job for job in jobs}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            job = pending.pop(ready)
            try:
                on_end(job, ray.get(ready))
            except (CellStoppedError, ray.exceptions.RayError) as error:
                on_end(job, _stopped_record(job, error))
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _task(job: Job) -> Record | None:
    record = CellProcess(job).outcome()
    if record is not None and record.status == "stopped":
        raise CellStoppedError(record.error)
    return record


def _stopped_record(job: Job, error: Exception) -> Record:
    folder = CellFolder(job.folder)
    return folder.record() or folder.mark_stopped(job.record, str(error))
