"""Folders of runs: each run has its own, also when runs start together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from lpc_lightning.cli.run_folder import DiscardedRunFolder, RunFolder


def test_runs_that_start_together_do_not_meet(tmp_path: Path) -> None:
    together = Barrier(16)

    def claim(_: int) -> Path:
        together.wait()
        return RunFolder(tmp_path / "runs").path

    with ThreadPoolExecutor(16) as threads:
        claimed = {path.name for path in threads.map(claim, range(16))}
    assert claimed == {f"version_{number}" for number in range(16)}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == claimed


def test_run_folder_fills_the_first_gap(tmp_path: Path) -> None:
    for name in ("version_0", "version_2"):
        (tmp_path / name).mkdir()
    assert [RunFolder(tmp_path).path.name for _ in range(2)] == ["version_1", "version_3"]


def test_release_keeps_what_a_run_has_written(tmp_path: Path) -> None:
    empty, written = RunFolder(tmp_path), RunFolder(tmp_path)
    (written.path / "config.yaml").touch()
    empty.release()
    written.release()
    assert [path.name for path in tmp_path.iterdir()] == ["version_1"]


def test_discarded_run_folder_leaves_nothing() -> None:
    folder = DiscardedRunFolder()
    (folder.path / "checkpoints").mkdir()
    folder.release()
    assert not folder.path.exists()
