"""The work of a cell's process: lock, log, fit, and the record of the outcome."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace

import torch
from filelock import FileLock, Timeout
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.cli.system_errors import explain_system_error
from lpc_lightning.cli.user_errors import USER_ERRORS
from lpc_lightning.evaluation.ablation.cells.cell_run import run_cell
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder
from lpc_lightning.evaluation.ablation.cells.process import LOCKED_EXIT_CODE, NO_STEP_EXIT_CODE, Job

LOCK_TIMEOUT = 10.0
"""Maximum time to wait for a cell's lock, in seconds. The cells of a killed command end within this time."""


def work(job: Job) -> None:
    """Run a cell, and write its record.

    If another command is running the cell, the process ends with exit code `LOCKED_EXIT_CODE`. If an attempt that would
    replace earlier results fails before its first step, they stay with their record, and the exit code is
    `NO_STEP_EXIT_CODE`.

    Args:
        job: The cell to run.
    """
    _end_with_server()
    _end_with_command()
    # Ctrl-C also reaches the command, which then stops its cells with SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if job.environment is not None:
        os.environ.clear()
        os.environ.update(job.environment)
    os.environ["OMP_NUM_THREADS"] = str(job.threads)  # for processes started by this one
    os.chdir(job.directory)
    torch.set_num_threads(job.threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(CellFolder(job.folder).lock, timeout=LOCK_TIMEOUT):
            _attempt(job)
    except Timeout:
        os._exit(LOCKED_EXIT_CODE)


def _attempt(job: Job) -> None:
    folder, start = CellFolder(job.folder), time.monotonic()
    folder.put_back()
    before = folder.record()
    if before is not None and before.fingerprint == job.record.fingerprint and folder.is_finished:
        return  # another command has finished the cell in the meantime
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
    except BaseException as fault:
        is_diverged = isinstance(fault, FloatingPointError)
        error, record = log_fault(fault, folder), replace(record, status="failed", diverged=is_diverged)
    else:
        folder.discard_earlier()  # a fit may have no step
        record = replace(record, status="finished")
    if error is not None and not record.diverged and folder.put_back():
        print(f"The earlier files of this cell stay, because no step was made: {error.splitlines()[-1]}", flush=True)
        sys.exit(NO_STEP_EXIT_CODE if record.status == "failed" else 128 + signal.SIGTERM)
    seconds, peak = record.seconds + time.monotonic() - start, max(record.peak_bytes, _peak_bytes())
    folder.write(replace(record, error=error, seconds=seconds, peak_bytes=peak))
    if job.remove_checkpoints and folder.is_finished:
        folder.remove_checkpoints()


def log_fault(fault: BaseException, folder: CellFolder) -> str:
    """Write an error to the log. Return the end of the log, with the cause as its last line."""
    explained = str(fault) if isinstance(fault, USER_ERRORS) else explain_system_error(fault)
    with suppress(OSError):  # the disk may be full
        if isinstance(fault, SystemExit):  # the parser of the arguments has printed why
            explained = f"\n{folder.last_lines()}".rpartition("\nerror: ")[2]
        elif explained is None:
            traceback.print_exc()
        else:
            print(f"error: {explained}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    cause = " ".join((f"{type(fault).__name__}: {fault}" if explained is None else explained).split())
    end = folder.last_lines()
    return end if end.endswith(cause) else f"{end}\n{cause}".strip()


def _peak_bytes() -> int:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _end_with_server() -> None:
    """Make the kernel kill this process when the server is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_with_command() -> None:
    """Kill this process when the command ends, also if the command was killed.

    The server outlives a killed command: it waits for the end of a pipe that its cells hold open as well. Each cell
    therefore watches a pipe that only the command holds.
    """
    command = multiprocessing.parent_process()
    assert command is not None

    def watch() -> None:
        command.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
