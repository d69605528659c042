"""Tests that a checkpoint replaces another one, also of the other form and with leftovers of a killed process."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpc_lightning.distributed.sharded_checkpoint import put_in_place


def make(path: Path, kind: str) -> None:
    """Create a folder with a file in it, or a file."""
    if kind == "folder":
        path.mkdir()
        (path / "shard").write_text(path.name)
    elif kind == "file":
        path.write_text(path.name)


@pytest.mark.parametrize("new", ["folder", "file"])
@pytest.mark.parametrize("left", ["nothing", "folder", "file"])
@pytest.mark.parametrize("before", ["nothing", "folder", "file"])
def test_save_replaces_earlier_checkpoint(before: str, left: str, new: str, tmp_path: Path) -> None:
    partial, path = tmp_path / ".last.ckpt.partial", tmp_path / "last.ckpt"
    make(partial, new)
    make(path, before)
    make(tmp_path / ".last.ckpt.old", left)
    put_in_place(partial, path)
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]
    assert (path / "shard" if new == "folder" else path).read_text() == partial.name
