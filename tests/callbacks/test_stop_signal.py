"""The stop signal of one process reaches all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from lpc_lightning.callbacks import GracefulStop


def _ask(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    stop = GracefulStop()
    stop._processes = dist.new_group(backend="gloo")
    before = stop._requested_anywhere()
    stop._requested = rank == 1
    after = stop._requested_anywhere()
    Path(folder, str(rank)).write_text(f"{before} {after}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_signal_reaches_all_processes(tmp_path: Path) -> None:
    mp.start_processes(_ask, (str(tmp_path),), nprocs=2, start_method="spawn")
    assert [(tmp_path / name).read_text() for name in "01"] == ["False True", "False True"]
