"""Lock of a cache entry: if several runs need the same missing entry, one makes it and the others wait."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(entry: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of a cache entry. The caller must check again inside the context whether the entry is missing.

    The lock only avoids duplicate work. Correctness does not depend on it, because entries are complete or absent. So
    if the file system has no locks, or the wait exceeds `seconds`, the run continues without the lock. The system
    releases the lock of a killed process.

    Args:
        entry: Folder of the entry, inside the folder of its kind in the cache.
        seconds: Maximum waiting time. None: no limit.
    """
    path = entry.parent.parent / "locks" / f"{entry.parent.name}-{entry.name}"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if seconds is None else seconds)
    except (OSError, NotImplementedError, Timeout) as error:
        log.info("Continuing without the lock %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()
