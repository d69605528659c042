"""Folders of results: complete or as they were, also after an error and after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.whole_folders import check_writable, whole_folder

KILLED = """
import os, sys
from pathlib import Path
from lpc_lightning.files.whole_folders import whole_folder

target, left = Path(sys.argv[1]), int(sys.argv[2])
rename = Path.rename

def counted(self, place):
    global left
    if not left:
        os._exit(9)
    left -= 1
    return rename(self, place)

Path.rename = counted
with whole_folder(target, ("key",)) as folder:
    for name in ("a", "key", "z"):
        (folder / name).write_text("new")
os._exit(0)
"""
"""Fills a folder, and dies at a rename."""


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def fill(folder: Path, text: str, *names: str) -> None:
    for name in names:
        (folder / name).write_text(text)


def test_whole_folder_is_new(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "out", ()) as folder:
        fill(folder, "new", "key")
        assert not (tmp_path / "a" / "out").exists()
    assert content(tmp_path / "a" / "out") == {"key": "new"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("earlier", [(), ("key", "old")])
def test_whole_folder_stays_the_same_folder(earlier: tuple[str, ...], tmp_path: Path) -> None:
    """A shell, or a mount, has the folder and not its path."""
    tmp_path.chmod(0o711)
    fill(tmp_path, "old", *earlier)
    held = os.open(tmp_path, os.O_RDONLY)
    try:
        with whole_folder(tmp_path, ("key",)) as folder:
            fill(folder, "new", "key", "more")
            assert {path.name for path in tmp_path.iterdir()} == {*earlier, folder.parent.name}
        assert sorted(os.listdir(held)) == ["key", "more"]
        assert os.fstat(held).st_mode & 0o777 == 0o711
    finally:
        os.close(held)
    assert content(tmp_path) == {"key": "new", "more": "new"}


def test_whole_folder_after_an_error(tmp_path: Path) -> None:
    fill(tmp_path, "old", "key", "old")

    def refuse() -> None:
        raise ConfigError("no")

    with pytest.raises(ConfigError), whole_folder(tmp_path, ("key",), refuse) as folder:
        fill(folder, "new", "key")
    assert content(tmp_path) == {"key": "old", "old": "old"}
    (tmp_path / "of_another.unfinished").mkdir()
    # The last of the renames fails: a file cannot take the place of a folder.
    with pytest.raises(IsADirectoryError), whole_folder(tmp_path, ("of_another.unfinished",)) as folder:
        fill(folder, "new", "key", "more", "of_another.unfinished")
    (tmp_path / "of_another.unfinished").rmdir()
    assert content(tmp_path) == {"key": "old", "old": "old"}


@pytest.mark.slow
def test_whole_folder_after_a_kill(tmp_path: Path) -> None:
    """At each rename: the file without which nothing opens the folder is among files of one kind only, or absent."""
    complete = {"a": "new", "key": "new", "z": "new"}
    for renames in range(7):
        target = tmp_path / str(renames)
        target.mkdir()
        fill(target, "old", "a", "key", "old")
        done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(renames)])
        found = {path.name: path.read_text() for path in target.iterdir() if path.is_file()}
        assert done.returncode == (0 if renames == 6 else 9)
        if "key" in found:
            assert found == (complete if renames == 6 else {"a": "old", "key": "old", "old": "old"})
            assert renames in (0, 6)


def test_check_writable(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "new" / "out"):
        check_writable(target, "output")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"^output: cannot write to /proc \(.*\), expected a folder with write perm"):
        check_writable(Path("/proc/no/such/folder"), "output")
    with (
        whole_folder(tmp_path, ()),
        pytest.raises(ConfigError, match=r"output: found \..*unfinished in .* a stopped"),
    ):
        check_writable(tmp_path, "output")
