"""Whether files are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def fingerprint(paths: Iterable[Path]) -> str:
    """A text that changes when one of the files does: by name, size and time, since weights take long to read."""
    stats = [(str(path), path.stat()) for path in sorted(paths) if path.is_file()]
    told = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def weights_of(model: str) -> str | None:
    """The fingerprint of a model on this machine; None for a hub name, behind which the hub may change the weights."""
    path = Path(model)
    if path.is_dir():
        return fingerprint(path.iterdir())
    return fingerprint([path]) if path.is_file() else None
