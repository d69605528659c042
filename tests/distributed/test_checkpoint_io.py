"""Tests that checkpoints are complete or absent, on a full disk and if the process is killed while it writes."""

import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lpc_lightning.distributed.checkpoint_io import AtomicCheckpointIO, CheckpointWriteError


def small() -> dict:
    return {"state_dict": {"weight": torch.arange(6.0)}}


def test_save_writes_one_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(small(), path)
    assert torch.equal(torch.load(path)["state_dict"]["weight"], torch.arange(6.0))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_save_on_full_disk_keeps_earlier_file(tmp_path: Path) -> None:
    """A limit on the file size stops the write in the middle with an OSError, like a full disk."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(small(), path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointWriteError) as error:
            AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(1 << 20)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    for part in (str(path), "4 MiB", "default_root_dir", "Earlier checkpoints are intact"):
        assert part in str(error.value)


def test_save_without_folder_raises_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointWriteError, match="could not write"):
        AtomicCheckpointIO().save_checkpoint(small(), tmp_path / "file" / "last.ckpt")


@pytest.mark.slow
def test_killed_save_keeps_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(small(), path)
    before = path.read_bytes()
    script = f"""
        import time, torch
        from pathlib import Path
        from lpc_lightning.distributed.checkpoint_io import AtomicCheckpointIO

        class Stuck:
            def __reduce__(self):
                Path({str(tmp_path / "stuck")!r}).touch()
                time.sleep(600)

        AtomicCheckpointIO().save_checkpoint({{"state_dict": torch.ones(1000), "x": Stuck()}}, {str(path)!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "stuck").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
