"""Execution of cells on this machine, several at a time."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from types import FrameType

from lpc_lightning.evaluation.ablation.cells.folder import Record
from lpc_lightning.evaluation.ablation.cells.process import CellProcess, Job

OnCellEnd = Callable[[Job, Record | None], None]
"""Function that is called after each cell. The record is None if another command is running the cell."""


def run_locally(jobs: Sequence[Job], processes: int, on_end: OnCellEnd) -> None:
    """Run cells in processes of this machine.

    After Ctrl-C or SIGTERM, running cells write a checkpoint and end. After a second signal, they are killed.

    Args:
        jobs: The cells, in order.
        processes: Number of cells at a time.
        on_end: Function that is called after each cell.

    Raises:
        KeyboardInterrupt: The command was interrupted. Raised after the cells have ended.
    """
    waiting, running = deque(jobs), dict[int, CellProcess]()
    previous_handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                started = CellProcess(waiting.popleft())
                running[started.sentinel] = started
            _collect(running, on_end)
    except KeyboardInterrupt:
        _stop(running, on_end)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _collect(running: dict[int, CellProcess], on_end: OnCellEnd) -> None:
    """Wait until at least one process has ended, and remove the ended processes."""
    for sentinel in wait(list(running)):
        ended = running[sentinel]  # type: ignore[index]  # sentinels are numbers
        on_end(ended.job, ended.outcome())
        del running[sentinel]  # type: ignore[arg-type]


def _stop(running: dict[int, CellProcess], on_end: OnCellEnd) -> None:
    for process in running.values():
        process.stop()
    try:
        while running:
            _collect(running, on_end)
    except KeyboardInterrupt:
        for process in running.values():
            process.kill()
        while running:
            _collect(running, on_end)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
