"""One cell in a separate process.

Cell processes are forked from a server process that has imported all modules and run nothing. A cell therefore starts
much faster than with its own imports, and is not affected by other cells. The server starts with the first cell. It
ends with the process that started it. That process does not need the server's imports: the cell's work is in `work`.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lpc_lightning.evaluation.ablation.cells.folder import CellFolder, Record, Weights

FORKED = multiprocessing.get_context("forkserver")
MODULES = ("lpc_lightning.__main__", "lpc_lightning.evaluation.ablation.cells.work", "lpc_lightning.callbacks")
"""Modules that the server imports: the command first, which imports without garbage collection."""
FORKED.set_forkserver_preload(list(MODULES))
LOCKED_EXIT_CODE = 75
"""Exit code if another command is running the cell."""
NO_STEP_EXIT_CODE = 76
"""Exit code if the attempt has failed before its first step, and earlier files of the cell stay."""


@dataclass(frozen=True)
class Job:
    """A cell to run, with the settings of its process."""

    folder: Path
    """The cell's folder, as an absolute path."""
    record: Record
    weights: Weights
    threads: int
    """Number of torch threads."""
    directory: Path
    """Working directory, for relative paths in the arguments."""
    environment: Mapping[str, str] | None = None
    """Environment variables. None: those of the server."""
    remove_checkpoints: bool = False
    """True: the checkpoints are removed when the cell has finished."""


class CellProcess:
    """A running cell."""

    def __init__(self, job: Job) -> None:
        """Start the process.

        Args:
            job: The cell to run.
        """
        self.job = job
        self._process = FORKED.Process(target=_work, args=(job,))
        self._process.start()

    @property
    def sentinel(self) -> int:
        """A handle that becomes ready when the process ends (see `multiprocessing.connection.wait`)."""
        return self._process.sentinel

    def stop(self) -> None:
        """Send SIGTERM, after which the cell writes a checkpoint and ends."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, which ends the process at once."""
        self._process.kill()

    def outcome(self) -> Record | None:
        """Wait for the end of the process, and return the cell's record. None if another command is running the cell.

        If the process was killed before it could write the record, the record is written here. A record of earlier
        settings or code stays as it is if the process ended before it began, or failed before its first step.
        """
        self._process.join()
        code = self._process.exitcode or 0
        if code == LOCKED_EXIT_CODE:
            return None
        folder = CellFolder(self.job.folder)
        record = folder.record()
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if code == NO_STEP_EXIT_CODE:
            return replace(self.job.record, status="failed", error=folder.last_lines())
        if code and record is not None and record.fingerprint != self.job.record.fingerprint:
            return replace(self.job.record, status="stopped", error=f"{reason} before it began")
        if record is None or record.status == "running":
            record = folder.mark_stopped(record or self.job.record, "\n".join([folder.last_lines(), reason]).strip())
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write(record)
        return record


def _work(job: Job) -> None:
    # Imports torch and Lightning, which the server alone needs.
    from lpc_lightning.evaluation.ablation.cells.work import work

    work(job)
