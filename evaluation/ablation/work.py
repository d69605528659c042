"""What the process of a cell does."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from dataclasses import replace

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.cli import USER_ERRORS
from lpc_lightning.evaluation.ablation.cell_run import run_cell
from lpc_lightning.evaluation.ablation.folder import CellFolder
from lpc_lightning.evaluation.ablation.process import TAKEN, Job

WAIT = 10.0
"""Seconds that a cell's lock is waited for: what a killed command has left behind is gone by then."""


def work(job: Job) -> None:
    """Run a cell, and write down how it went.

    Args:
        job: What to run. The process ends with exit code `TAKEN` where another command is at work on it.
    """
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
    except USER_ERRORS as fault:
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
