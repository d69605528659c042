"""Fingerprints of files, to detect changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def files_fingerprint(paths: Iterable[Path], folder: Path) -> str:
    """Return a hash of the names, sizes and times of files. The contents are not read: weights are large.

    Args:
        paths: The files.
        folder: Folder that the names are relative to. The hash is the same after it was moved.
    """
    stats = [(str(path.relative_to(folder)), path.stat()) for path in paths if path.is_file()]
    entries = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in sorted(stats)]
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def weights_fingerprint(model: str) -> str | None:
    """Return the fingerprint of a local model. None for a hub name, whose weights may change on the hub."""
    path = Path(model).resolve()
    if path.is_dir():
        return files_fingerprint(path.iterdir(), path)
    return files_fingerprint([path], path.parent) if path.is_file() else None


def model_identity(model: str) -> dict[str, str | None]:
    """Return `model`, the resolved path or the hub name, and `weights`, the fingerprint of its files."""
    path = Path(model)
    return {"model": str(path.resolve()) if path.exists() else model, "weights": weights_fingerprint(model)}
