"""One cell in a process of its own.

Such processes are forked from a server that has imported everything and done nothing: a cell starts in a fraction of
the time that the imports take, and finds no trace of any other cell. The server starts with the first cell, and goes
with the process that started it.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import SIGTERMException

from evaluation.ablation.cell_run import Weights, run_cell
from evaluation.ablation.folder import CellFolder, Record
from lpc_lightning.cli import MENDABLE

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["evaluation.ablation.process", "callbacks"])
TAKEN = 75
"""Exit code: another command is at work on the cell."""
WAIT = 10.0
"""Seconds that a cell's lock is waited for: what a killed command has left behind is gone by then."""


@dataclass(frozen=True)
class Job:
    """A cell to be run, and how."""

    folder: Path
    """The cell's folder, as an absolute path."""
    record: Record
    weights: Weights
    threads: int
    """Of torch."""
    directory: Path
    """Where relative paths in the arguments start."""
    environment: Mapping[str, str] | None = None
    """Environment variables. None: those of the server."""


class CellProcess:
    """A cell at work."""

    def __init__(self, job: Job) -> None:
        """Start it.

        Args:
            job: What to run.
        """
        self.job = job
        self._process = FORKED.Process(target=_work, args=(job,))
        self._process.start()

    @property
    def sentinel(self) -> int:
        """Ready once the process has ended (see `multiprocessing.connection.wait`)."""
        return self._process.sentinel

    def stop(self) -> None:
        """Ask it to write a checkpoint and end."""
        self._process.terminate()

    def kill(self) -> None:
        """End it."""
        self._process.kill()

    def outcome(self) -> Record | None:
        """Wait for it to end: the cell's record, or None where another command is at work on it."""
        self._process.join()
        code = self._process.exitcode or 0
        if code == TAKEN:
            return None
        folder = CellFolder(self.job.folder)
        record = folder.record()
        if record is None or record.status == "running":
            # It could not say so itself.
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            record = folder.given_up(record or self.job.record, "\n".join([folder.last_lines(), reason]).strip())
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write(record)
        return record


def _work(job: Job) -> None:
    _end_with_the_server()
    # The command hears Ctrl-C as well, and then asks its cells to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if job.environment is not None:
        os.environ.clear()
        os.environ.update(job.environment)
    os.environ["OMP_NUM_THREADS"] = str(job.threads)  # of the processes that this one starts
    os.chdir(job.directory)
    torch.set_num_threads(job.threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.folder / "lock", timeout=WAIT):
            _attempt(job)
    except Timeout:
        os._exit(TAKEN)


def _attempt(job: Job) -> None:
    folder, start = CellFolder(job.folder), time.monotonic()
    before = folder.record()
    if before is not None and before.fingerprint == job.record.fingerprint and folder.is_finished:
        return  # another command was faster
    record = folder.begin(job.record)
    with folder.log.open("a") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    print(f"\n=== attempt {record.attempts}: lpc-lightning fit {' '.join(record.arguments)}", flush=True)
    error = None
    try:
        run_cell(job.folder, job.weights)
    except SIGTERMException:
        error, record = "stopped by SIGTERM", replace(record, status="stopped")
    except MENDABLE as fault:
        print(f"error: {fault}", file=sys.stderr)
        record = replace(record, status="failed")
    except BaseException:
        traceback.print_exc()
        record = replace(record, status="failed")
    else:
        record = replace(record, status="finished")
    for stream_object in (sys.stdout, sys.stderr):
        stream_object.flush()
    if record.status == "failed":
        error = folder.last_lines()
    seconds, peak = record.seconds + time.monotonic() - start, max(record.peak_bytes, _peak_bytes())
    folder.write(replace(record, error=error, seconds=seconds, peak_bytes=peak))


def _peak_bytes() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _end_with_the_server() -> None:
    """Have the kernel end this process when the server ends, as it does when the command is killed (Linux alone).

    Elsewhere the cell goes on; it holds its lock, and the next command leaves it alone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
