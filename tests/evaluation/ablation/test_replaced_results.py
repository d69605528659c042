"""Tests of results that an attempt with other settings replaces: they stay until it has made a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from lpc_lightning.evaluation.ablation.cells.folder import CellFolder, Record
from lpc_lightning.evaluation.ablation.command import ablate
from lpc_lightning.evaluation.ablation.grids.grid import Cell
from lpc_lightning.evaluation.ablation.plan import plan_cells

NAME = "latent=none,noise=0,seed=1"
ADVICE = "1 finished cell has other settings, files or code; its results will be replaced (--keep_stale keeps them)."


def contents(cell: Path) -> dict[str, bytes]:
    """Return the content of all files of a cell, except its log and its lock."""
    files = (path for path in sorted(cell.rglob("*")) if path.is_file() and path.name not in ("log.txt", "lock"))
    return {path.relative_to(cell).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def cell(uninterrupted: Path, tmp_path: Path) -> Path:
    """Folder of a finished cell."""
    folder = tmp_path / "out" / "cells" / NAME
    shutil.copytree(uninterrupted / "cells" / NAME, folder)
    return folder


@pytest.fixture
def run(uninterrupted: Path, cell: Path) -> Callable[..., bool]:
    """Function that runs the finished cell with changes."""

    def run(*changes: str, **settings: Any) -> bool:
        grid = [str(uninterrupted.parent / "small.yaml"), "latent=none", "noise=0", *changes]
        return ablate(grid, output=str(cell.parent.parent), threads=1, **settings)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "number", "cause"),
    [
        (["model.betta=0.2"], None, "betta"),
        (["model.betta=0.2"], 0, "betta"),
        (["data=PreferenceData", "data.path=none.jsonl"], None, "none.jsonl"),
    ],
)
def test_misspelt_change_keeps_results(
    run: Callable[..., bool],
    cell: Path,
    changes: list[str],
    number: int | None,
    cause: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(cell)
    assert not run(*changes, cell=number)
    assert contents(cell) == before
    lines = capsys.readouterr().out.splitlines()
    assert ADVICE in lines
    assert f"[1/1] {NAME}: failed after" in " ".join(lines)
    (reason,) = [line for line in lines if "no step was made" in line]
    assert cause in reason
    assert run()
    assert "0 cells to run" in capsys.readouterr().out


@pytest.mark.slow
def test_other_directory_keeps_results(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (grid.parent / "other").mkdir()
    content = yaml.safe_load(grid.read_text())
    (grid.parent / "conf.yaml").write_text("trainer: {max_epochs: 1}\n")
    content["base"] = ["--config=conf.yaml", *(each for each in content["base"] if "max_epochs" not in each)]
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    arguments, output = [str(grid), "latent=none", "noise=0"], grid.parent / "out"
    monkeypatch.chdir(grid.parent)
    assert ablate(arguments, output=str(output), threads=1)
    before = contents(output / "cells" / NAME)
    monkeypatch.chdir(grid.parent / "other")
    assert not ablate(arguments, output=str(output), threads=1)
    assert contents(output / "cells" / NAME) == before


@pytest.mark.slow
def test_first_step_replaces_results(run: Callable[..., bool], cell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("trainer.max_epochs=1")
    assert ADVICE in capsys.readouterr().out
    assert json.loads((cell / "results.json").read_text())["step"] == 12
    assert not (cell / "earlier").exists()
    assert run("trainer.max_epochs=1")
    assert "finished cell has" not in capsys.readouterr().out


@pytest.mark.slow
def test_failure_after_first_step_is_recorded(run: Callable[..., bool], cell: Path) -> None:
    """Such a failure is one of the run, not of its settings."""
    assert not run("model.optimizer.lr=1e38")
    record = json.loads((cell / "cell.json").read_text())
    assert (record["status"], record["diverged"]) == ("failed", True)
    assert not (cell / "results.json").exists()
    assert not (cell / "earlier").exists()


# Attempts that are killed


def begun(path: Path, status: Any, *files: str) -> CellFolder:
    """Return the folder of a cell with some files, whose next attempt has other settings and has begun."""
    folder = CellFolder(path / "cells" / "seed=1")
    old = Record({"seed": 1}, 1, "old", (), (), status=status)
    folder.path.mkdir(parents=True)
    folder.write(old)
    for name in files:
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / name).write_text("{}")
    folder.begin(replace(old, fingerprint="new", status="running"))
    folder.run.mkdir()
    (folder.run / "config.yaml").write_text("new")
    return folder


@pytest.mark.parametrize(
    ("status", "files"),
    [
        ("finished", ["results.json", "pairs_test.jsonl", "run/config.yaml"]),
        ("stopped", ["run/checkpoints/last.ckpt", "run/config.yaml", "metrics_before_0.csv"]),
    ],
)
def test_plan_after_kill_before_first_step(tmp_path: Path, status: str, files: list[str]) -> None:
    folder = begun(tmp_path, status, *files)
    assert not folder.is_finished
    plan_cells(tmp_path, [Cell({"seed": 1}, ())], "last")
    record = folder.record()
    assert record is not None
    assert (record.status, record.fingerprint) == (status, "old")
    assert contents(folder.path) == dict.fromkeys(files, b"{}") | {
        "cell.json": (folder.path / "cell.json").read_bytes()
    }


def test_plan_leaves_running_cells(tmp_path: Path) -> None:
    """Another process holds the lock of a running cell."""
    folder = begun(tmp_path, "finished", "results.json")
    with FileLock(folder.path / "lock"):
        plan_cells(tmp_path, [Cell({"seed": 1}, ())], "last")
    assert not folder.is_finished
    plan_cells(tmp_path, [Cell({"seed": 1}, ())], "last")
    assert folder.is_finished


@pytest.mark.parametrize(("status", "files"), [("failed", ["run/checkpoints/last.ckpt"]), ("stopped", [])])
def test_begin_removes_what_is_of_no_use(tmp_path: Path, status: str, files: list[str]) -> None:
    folder = begun(tmp_path, status, *files)
    plan_cells(tmp_path, [Cell({"seed": 1}, ())], "last")
    record = folder.record()
    assert record is not None
    assert record.fingerprint == "new"
    assert (folder.run / "config.yaml").read_text() == "new"
