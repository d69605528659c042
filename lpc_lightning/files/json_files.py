"""Files that are complete or absent, JSON and others, and the reading of JSON files that are neither."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from lpc_lightning.errors import DamagedFileError, one_line


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside its target. At the end, wait until it is on the disk, and rename it.

    A process that is killed meanwhile, and a loss of power, leave the earlier file.

    Args:
        path: Target. Its folder exists.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_pieces(path: Path, pieces: Iterable[str]) -> None:
    """Write a text into a `replaced_file`.

    Args:
        path: Target. Its folder exists.
        pieces: Content, written in UTF-8. Half of a surrogate pair, which UTF-8 cannot encode, becomes an escape.
    """
    with replaced_file(path) as file:
        file.writelines(piece.encode(errors="backslashreplace") for piece in pieces)


def write_text(path: Path, text: str) -> None:
    """Write a text as `write_pieces` does."""
    write_pieces(path, [text])


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_pieces` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DamagedFileError: The file cannot be read, is no JSON, or holds another value.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: found no JSON ({one_line(error)}), expected a JSON object.") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path}: found {type(content).__name__}, expected a JSON object.")
    return content


def read_if_whole(path: Path, consequence: str) -> dict[str, Any]:
    """Read a JSON object that a command can do without. Empty if the file is missing or damaged.

    Args:
        path: The file.
        consequence: Sentence about what the command does without the file, for the warning about a damaged one.
    """
    try:
        return read_json_object(path) if path.is_file() else {}
    except DamagedFileError as error:
        warnings.warn(f"{error} {consequence}", stacklevel=2)
        return {}
