"""Names of files and folders that are being written to a cache, and the removal of those of killed processes."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from uuid import uuid4

UNFINISHED = ".unfinished"
"""End of their names."""
LONGEST_SECONDS = 24 * 3600
"""Longest time that a file or folder may take to be written."""


def unfinished_path(folder: Path, name: str) -> Path:
    """Return an unused path in a folder for a file or folder that will be renamed when it is complete.

    Args:
        folder: Folder of the complete ones.
        name: Start of its name.
    """
    return folder / f"{name}.{uuid4().hex}{UNFINISHED}"


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder more than a day ago."""
    for leftover in folder.glob(f"*{UNFINISHED}"):
        # Another process may remove it at the same time, or it belongs to another user. A link may lead to nothing.
        with contextlib.suppress(OSError):
            if time.time() - leftover.lstat().st_mtime <= LONGEST_SECONDS:
                continue
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
