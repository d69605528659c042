"""Folders of results that are complete or as they were."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.unfinished import UNFINISHED, unfinished_path


@contextmanager
def whole_folder(target: Path, last: Collection[str], check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Yield an empty folder for new files. At the end it becomes `target`, or its files move there.

    A folder that exists stays the same folder, because it may be a mount, or the working directory of a shell. Its
    files are replaced. After an error they are as before.

    Args:
        target: A folder, or a path that does not exist.
        last: Names of the files without which nothing opens the folder. They are the last to come and the first to go,
            so that a process that is killed leaves no folder that seems complete.
        check: Called before `target` is changed.
    """
    scratch = unfinished_path(target if target.is_dir() else target.parent, f".{target.name[:100]}")
    new, old = scratch / "new", scratch / "old"
    try:
        new.mkdir(parents=True)
        old.mkdir()
        yield new
        check()
        if not target.is_dir():
            new.rename(target)
            return
        leaving = sorted(content_of(target), key=lambda path: path.name not in last)
        coming = sorted(new.iterdir(), key=lambda path: path.name in last)
        _move({path: old / path.name for path in leaving} | {path: target / path.name for path in coming})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def content_of(folder: Path) -> list[Path]:
    """Return the files of a folder, without those that a command is writing."""
    return [path for path in folder.iterdir() if not path.name.endswith(UNFINISHED)]


def check_writable(target: Path, setting: str) -> None:
    """Check that `whole_folder` can write, before the work for it. A folder that does not exist is not made.

    Raises:
        ConfigError: The folder, or the one that it would be made in, is not writable, or has the files of a command
            that writes or was killed.
    """
    place = next(path for path in (target, *target.absolute().parents) if path.exists())
    probe = unfinished_path(place, ".probe")
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise ConfigError(
            f"{setting}: cannot write to {place} ({error.strerror}), expected a folder with write permission. Give "
            "another one."
        ) from error
    if target.is_dir() and (found := [path for path in target.iterdir() if path.name.endswith(UNFINISHED)]):
        raise ConfigError(
            f"{setting}: found {found[0].name} in {target}, which another command writes or a stopped one has left. "
            "Wait for it, or remove it."
        )


def _move(places: Mapping[Path, Path]) -> None:
    """Rename files, from the first place to the second. After an error, all are where they were."""
    done = []
    try:
        for source, target in places.items():
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise
