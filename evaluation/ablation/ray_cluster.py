"""Cells on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.folder import CellFolder, Record
from lpc_lightning.evaluation.ablation.local import Done
from lpc_lightning.evaluation.ablation.process import CellProcess, Job


class CellStoppedError(Exception):
    """A cell whose process was killed; tried again, it goes on from its checkpoint."""


def run_on_ray(jobs: Sequence[Job], cpus: float, gpus: float, retries: int, done: Done) -> None:
    """Run cells as tasks of the Ray cluster at hand (`RAY_ADDRESS`, or the one that runs on this machine).

    Its nodes need this project installed, and see the output folder, the data and the caches under the same paths.

    Args:
        jobs: The cells.
        cpus: CPUs of each, which Ray sets aside.
        gpus: The same for GPUs; below 1, cells share one.
        retries: How often a cell is taken up again whose process or node dies.
        done: Told of each cell that has ended.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("launcher: found ray, which is not installed: pip install 'lpc-lightning[ray]'.") from error
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            raise ConfigError(
                "launcher: found ray and no cluster to run on. Start one (`ray start --head`), or set RAY_ADDRESS."
            ) from error
    options: Any = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": retries, "retry_exceptions": [CellStoppedError]}
    remote: Any = ray.remote
    task = remote(**options)(_task)
    # Ray says which GPUs a cell may see, by the environment of its own process.
    pending = {task.remote(replace(job, environment=None)): job for job in jobs}
    try:
        while pending:
            (ready,), _ = ray.wait(list(pending))
            job = pending.pop(ready)
            try:
                done(job, ray.get(ready))
            except (CellStoppedError, ray.exceptions.RayError) as error:
                done(job, _recorded(job, error))
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _task(job: Job) -> Record | None:
    record = CellProcess(job).outcome()
    if record is not None and record.status == "stopped":
        raise CellStoppedError(record.error)
    return record


def _recorded(job: Job, error: Exception) -> Record:
    folder = CellFolder(job.folder)
    return folder.record() or folder.given_up(job.record, str(error))
