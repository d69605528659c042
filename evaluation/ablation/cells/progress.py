"""Console output of an ablation: one line per finished cell, with an estimate of the remaining time."""

from __future__ import annotations

import time

from tqdm import tqdm

from lpc_lightning.evaluation.ablation.cells.folder import CellFolder, Record
from lpc_lightning.evaluation.ablation.cells.process import Job


class Progress:
    """Lines on the console. On a terminal there is also a progress bar below them."""

    def __init__(self, cells: int) -> None:
        """Start the clock.

        Args:
            cells: Number of cells to run.
        """
        self._cells, self._start = cells, time.monotonic()
        self._bar = tqdm(total=cells, unit=" cells", disable=None, leave=False)
        self.ended: list[Record] = []
        self._count = 0

    def __call__(self, job: Job, record: Record | None) -> None:
        """Print the outcome of a cell. The record is None if another command is running the cell."""
        self._count += 1
        if record is not None:
            self.ended.append(record)
        outcome = "another command is running it" if record is None else describe_outcome(record)
        left = self._cells - self._count
        seconds = (time.monotonic() - self._start) / self._count * left
        estimate = f"; about {format_duration(seconds)} left" if left else ""
        self._bar.write(f"[{self._count}/{self._cells}] {job.folder.name}: {outcome}{estimate}")
        self._bar.update()
        if record is not None and record.error:
            self._bar.write(f"    {record.error.splitlines()[-1]}\n    {CellFolder(job.folder).log}")

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()


def describe_outcome(record: Record) -> str:
    """Describe how a cell ended, with its time and number of attempts."""
    attempts = f", attempt {record.attempts}" if record.attempts > 1 else ""
    return f"{record.status} after {format_duration(record.seconds)}{attempts}"


def format_duration(seconds: float) -> str:
    """Format a time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
