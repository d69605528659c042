"""One line for each cell that has ended, and how long the others will take."""

from __future__ import annotations

import time

from tqdm import tqdm

from lpc_lightning.evaluation.ablation.folder import CellFolder, Record
from lpc_lightning.evaluation.ablation.process import Job


class Progress:
    """Lines on the console, and on a terminal a bar below them."""

    def __init__(self, cells: int) -> None:
        """Start the clock.

        Args:
            cells: How many there are to run.
        """
        self._cells, self._start = cells, time.monotonic()
        self._bar = tqdm(total=cells, unit=" cells", disable=None, leave=False)
        self.ended: list[Record] = []
        self._seen = 0

    def __call__(self, job: Job, record: Record | None) -> None:
        """Tell of a cell that has ended; None: another command is at work on it."""
        self._seen += 1
        if record is not None:
            self.ended.append(record)
        told = "another command is at work on it" if record is None else outcome(record)
        left = self._cells - self._seen
        seconds = (time.monotonic() - self._start) / self._seen * left
        more = f"; about {duration(seconds)} to go" if left else ""
        self._bar.write(f"[{self._seen}/{self._cells}] {job.folder.name}: {told}{more}")
        self._bar.update()
        if record is not None and record.error:
            self._bar.write(f"    {record.error.splitlines()[-1]}\n    {CellFolder(job.folder).log}")

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def outcome(record: Record) -> str:
    """How a cell ended, in a few words."""
    attempts = f", attempt {record.attempts}" if record.attempts > 1 else ""
    return f"{record.status} after {duration(record.seconds)}{attempts}"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
