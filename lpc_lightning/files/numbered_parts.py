"""Files of a cache that several processes add to at the same time.

Each has a number as its name and a SHA-256 of its content at its end. It is written to a temporary file and then linked
to its name, so that a killed process leaves only complete files. They never change.
"""

from __future__ import annotations

import hashlib
import os
from itertools import count
from pathlib import Path

from lpc_lightning.files.unfinished import remove_leftovers, unfinished_path

DIGEST_SIZE = hashlib.sha256().digest_size


class NumberedParts:
    """Numbered files in a folder, which need not exist."""

    def __init__(self, folder: Path, suffix: str) -> None:
        """Keep the folder. Nothing is written.

        Args:
            folder: Folder of the files.
            suffix: End of their names, such as `.npz`.
        """
        self.folder, self._suffix = folder, suffix

    def paths(self) -> list[Path]:
        """Return the files in the order of their numbers."""
        return sorted(self.folder.glob("[0-9]" * 6 + self._suffix))

    def add(self, content: bytes) -> None:
        """Write a further file.

        Raises:
            OSError: The disk is full or not writable.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        scratch = unfinished_path(self.folder, "part")
        try:
            with scratch.open("xb") as file:
                file.write(content + hashlib.sha256(content).digest())
                file.flush()
                os.fsync(file.fileno())
            for number in count(max((int(path.stem) for path in self.paths()), default=-1) + 1):
                try:
                    os.link(scratch, self.folder / f"{number:06d}{self._suffix}")
                    return
                except FileExistsError:  # another process took this number
                    continue
        finally:
            scratch.unlink(missing_ok=True)


def read_part(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The content does not have its digest.
    """
    stored = path.read_bytes()
    content, digest = stored[:-DIGEST_SIZE], stored[-DIGEST_SIZE:]
    if hashlib.sha256(content).digest() != digest:
        raise ValueError("their content does not have its digest")
    return content
