"""Checks of the paths that commands write to.

Nothing is replaced that a command has not written itself, or that another running command writes to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from lpc_lightning.errors import ConfigError


def check_folder(path: Path, setting: str) -> None:
    """Check that a path is a folder, or that nothing exists there.

    Raises:
        ConfigError: The path is a file, a device, a pipe, or a link to nothing.
    """
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"{setting}: {path} is {_kind(path)}, expected a folder, or a path that does not exist.")


def check_file(path: Path, setting: str) -> None:
    """Check that a path is a file, or that nothing exists there.

    Raises:
        ConfigError: The path is a folder, a device, a pipe, or a link to nothing.
    """
    if os.path.lexists(path) and not path.is_file():
        raise ConfigError(f"{setting}: {path} is {_kind(path)}, expected a file, or a path that does not exist.")


def check_name(name: str, setting: str) -> None:
    """Check that a name can be the name of a folder in the output folder.

    Raises:
        ConfigError: The name is empty, has a separator, or leads out of the folder.
    """
    if not name.strip() or name.startswith(".") or any(character in name for character in "/\\\0\n"):
        raise ConfigError(
            f"{setting}: found {name!r}, expected a name for a folder: not empty, without / and \\, and not starting "
            "with a dot."
        )


def number_repeated(names: Sequence[str]) -> list[str]:
    """Return distinct names: the first of several equal ones unchanged, the others with a number, such as `run-2`.

    A number is skipped if another one of the names already ends with it.
    """
    taken = set(names)
    numbered: list[str] = []
    for place, name in enumerate(names):
        if name in names[:place]:
            name = next(free for number in count(2) if (free := f"{name}-{number}") not in taken)
            taken.add(name)
        numbered.append(name)
    return numbered


@contextmanager
def claim_output_folder(path: Path, setting: str) -> Iterator[None]:
    """Keep other commands from writing to a folder. It is made, and removed again if nothing is written.

    Raises:
        ConfigError: Another command writes to it.
    """
    existed = path.is_dir()
    path.mkdir(parents=True, exist_ok=True)
    try:
        with _claim(path, path / ".lock", setting):
            yield
    finally:
        if not existed:
            with suppress(OSError):  # it holds files
                path.rmdir()


@contextmanager
def claim_output_file(path: Path, setting: str) -> Iterator[None]:
    """Keep other commands from writing to a file. Its folder is made.

    Raises:
        ConfigError: Another command writes to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claim(path, path.resolve().with_name(f".{path.name}.lock"), setting):
        yield


@contextmanager
def _claim(path: Path, lock_file: Path, setting: str) -> Iterator[None]:
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{setting}: another command writes to {path}, expected a path of its own for each command. Give another "
            "path, or wait until the other command ends."
        ) from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)  # before the release: afterwards it could be the file of another command
        lock.release()


def _kind(path: Path) -> str:
    kinds = {
        "a folder": path.is_dir(),
        "a file": path.is_file(),
        "a pipe": path.is_fifo(),
        "a device": path.is_block_device() or path.is_char_device(),
        "a socket": path.is_socket(),
        "a link to nothing": path.is_symlink() and not path.exists(),
    }
    return next((name for name, holds in kinds.items() if holds), "of an unknown kind")
