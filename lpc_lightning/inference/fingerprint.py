"""Fingerprints of files, to detect changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Return a hash of the names, sizes and times of files. The contents are not read: weights are large."""
    stats = [(str(path), path.stat()) for path in sorted(paths) if path.is_file()]
    entries = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def weights_fingerprint(model: str) -> str | None:
    """Return the fingerprint of a local model. None for a hub name, whose weights may change on the hub."""
    path = Path(model)
    if path.is_dir():
        return files_fingerprint(path.iterdir())
    return files_fingerprint([path]) if path.is_file() else None
