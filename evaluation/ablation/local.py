"""Cells on this machine, so many at a time."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from types import FrameType

from lpc_lightning.evaluation.ablation.folder import Record
from lpc_lightning.evaluation.ablation.process import CellProcess, Job

Done = Callable[[Job, Record | None], None]
"""Told of each cell that has ended; None where another command is at work on it."""


def run_locally(jobs: Sequence[Job], processes: int, done: Done) -> None:
    """Run cells in processes of this machine.

    Ctrl-C or SIGTERM has those at work write a checkpoint and end; a second one kills them.

    Args:
        jobs: The cells, in order.
        processes: How many at a time.
        done: Told of each.

    Raises:
        KeyboardInterrupt: Asked to stop, after the cells have stopped.
    """
    waiting, running = deque(jobs), dict[int, CellProcess]()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                started = CellProcess(waiting.popleft())
                running[started.sentinel] = started
            _collect(running, done)
    except KeyboardInterrupt:
        _stop(running, done)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _collect(running: dict[int, CellProcess], done: Done) -> None:
    """Wait until some have ended."""
    for sentinel in wait(list(running)):
        ended = running[sentinel]  # type: ignore[index]  # sentinels are numbers
        done(ended.job, ended.outcome())
        del running[sentinel]  # type: ignore[arg-type]


def _stop(running: dict[int, CellProcess], done: Done) -> None:
    for process in running.values():
        process.stop()
    try:
        while running:
            _collect(running, done)
    except KeyboardInterrupt:
        for process in running.values():
            process.kill()
        while running:
            _collect(running, done)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
