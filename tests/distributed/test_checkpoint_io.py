"""Tests that checkpoints are complete or absent, on a full disk and if the process is killed while it writes."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lpc_lightning.distributed.checkpoint_io import AtomicCheckpointIO, CheckpointWriteError
from lpc_lightning.distributed.sharded_strategy import FSDP2Strategy
from tests.fixtures.processes import ForkedProcess


def small() -> dict:
    return {"state_dict": {"weight": torch.arange(6.0)}}


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Limit the size of files: a larger one stops in the middle with an OSError, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_save_writes_one_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(small(), path)
    assert torch.equal(torch.load(path)["state_dict"]["weight"], torch.arange(6.0))
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_save_on_full_disk_keeps_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(small(), path)
    before = path.read_bytes()
    with disk_of(1 << 20), pytest.raises(CheckpointWriteError) as error:
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(1 << 20)}}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    for part in (str(path), "4 MiB", "default_root_dir", "Earlier checkpoints are intact"):
        assert part in str(error.value)


def test_save_without_folder_raises_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointWriteError, match="could not write"):
        AtomicCheckpointIO().save_checkpoint(small(), tmp_path / "file" / "last.ckpt")


@pytest.mark.parametrize("name", ["last.ckpt", ".last.ckpt.partial"])
def test_save_over_shards_replaces_them(name: str, tmp_path: Path) -> None:
    """A run resumed without FSDP2 finds folders of shards under its checkpoints' names, or a half of one."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__0_0.distcp").write_text("a shard")
    AtomicCheckpointIO().save_checkpoint(small(), tmp_path / "last.ckpt")
    assert torch.equal(torch.load(tmp_path / "last.ckpt")["state_dict"]["weight"], torch.arange(6.0))
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_strategy_keeps_shards_until_the_file_is_there(tmp_path: Path) -> None:
    """FSDP2 that writes one file, in a run that wrote shards before."""
    path = tmp_path / "last.ckpt"
    path.mkdir()
    for name in ("meta.pt", ".metadata", "__0_0.distcp"):
        (path / name).write_text("earlier")
    strategy = FSDP2Strategy(save_distributed_checkpoint=False)
    strategy.checkpoint_io = AtomicCheckpointIO()
    with disk_of(1 << 20), pytest.raises(CheckpointWriteError):
        strategy.save_checkpoint({"state_dict": {"weight": torch.zeros(1 << 20)}}, path)
    assert sorted(file.name for file in path.iterdir()) == [".metadata", "__0_0.distcp", "meta.pt"]
    strategy.save_checkpoint(small(), path)
    assert torch.equal(torch.load(path)["state_dict"]["weight"], torch.arange(6.0))


class Stuck:
    """A value whose pickling does not end."""

    def __init__(self, started: Path) -> None:
        self.started = started

    def __reduce__(self) -> Any:
        self.started.touch()
        time.sleep(600)


def save_without_end(path: Path, started: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"state_dict": torch.ones(1000), "x": Stuck(started)}, path)


@pytest.mark.slow
def test_killed_save_keeps_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(small(), path)
    before = path.read_bytes()
    process = ForkedProcess(save_without_end, path, tmp_path / "stuck", log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "stuck").exists():
            assert process.is_running
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["last.ckpt"]
