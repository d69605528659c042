"""One cell in a process of its own.

Such processes are forked from a server that has imported everything and done nothing: a cell starts in a fraction of
the time that the imports take, and finds no trace of any other cell. The server starts with the first cell, and goes
with the process that started it, which need import nothing of it: what a cell does is in `work`.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lpc_lightning.evaluation.ablation.folder import CellFolder, Record, Weights

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["lpc_lightning.evaluation.ablation.work", "callbacks"])
TAKEN = 75
"""Exit code: another command is at work on the cell."""


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
    from lpc_lightning.evaluation.ablation.work import work  # torch and Lightning, which the server alone needs

    work(job)
