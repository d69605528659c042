"""Execution of cells on this machine, several at a time."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from types import FrameType

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.cells.folder import Record
from lpc_lightning.evaluation.ablation.cells.process import CellProcess, Job

OnCellEnd = Callable[[Job, Record | None], None]
"""Function that is called after each cell. The record is None if another command is running the cell."""


def run_locally(jobs: Sequence[Job], processes: int, on_end: OnCellEnd) -> None:
    """Run cells in processes of this machine.

    After Ctrl-C, SIGTERM or an error of `on_end`, running cells write a checkpoint and end. After a further signal,
    they are killed.

    Args:
        jobs: The cells, in order.
        processes: Number of cells at a time.
        on_end: Function that is called after each cell. A ConfigError that it raises ends the run.

    Raises:
        ConfigError: `on_end` raised it. Raised after the cells have ended.
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
    except (KeyboardInterrupt, ConfigError):
        _stop(running, on_end)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _collect(running: dict[int, CellProcess], on_end: OnCellEnd) -> None:
    """Wait until at least one process has ended, and remove the ended processes."""
    for sentinel in wait(list(running)):
        ended = running.pop(sentinel)  # type: ignore[arg-type]  # sentinels are numbers
        on_end(ended.job, ended.outcome())


def _stop(running: dict[int, CellProcess], on_end: OnCellEnd) -> None:
    for process in running.values():
        process.stop()
    try:
        _collect_all(running, on_end)
    except KeyboardInterrupt:
        for process in running.values():
            process.kill()
        _collect_all(running, on_end)


def _collect_all(running: dict[int, CellProcess], on_end: OnCellEnd) -> None:
    while running:
        with suppress(ConfigError):  # the run ends already
            _collect(running, on_end)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
