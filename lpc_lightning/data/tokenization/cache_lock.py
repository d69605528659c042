"""Of several runs that miss the same entry of a cache, one makes it and the others wait for it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


@contextmanager
def one_at_a_time(entry: Path, seconds: float | None = None) -> Iterator[None]:
    """Hold the lock of a cache's entry. Look again, once it is held, whether the entry is still missing.

    The lock saves work and nothing depends on it: entries are whole or not there by themselves. So a file system
    without locks, or a holder that takes too long, is gone on without. The lock of a process that is killed is free.

    Args:
        entry: Folder of the entry, in its kind's folder in the cache.
        seconds: How long to wait at most. None: for ever.
    """
    path = entry.parent.parent / "locks" / f"{entry.parent.name}-{entry.name}"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if seconds is None else seconds)
    except (OSError, NotImplementedError, Timeout) as error:
        log.info("Going on without the lock %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()
