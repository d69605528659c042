"""The stop signal of one process reaches all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from lpc_lightning.callbacks import GracefulStop
from tests.fixtures.processes import ForkedProcess


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
    processes = [ForkedProcess(_ask, rank, str(tmp_path), log=tmp_path / f"{rank}.log") for rank in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [(tmp_path / name).read_text() for name in "01"] == ["False True", "False True"]
