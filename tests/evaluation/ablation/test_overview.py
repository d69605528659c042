"""Tests of `ablation.json`: its command is one that has run cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.evaluation.ablation import cell_runner
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder
from lpc_lightning.evaluation.ablation.cells.local import OnCellEnd
from lpc_lightning.evaluation.ablation.cells.process import Job
from lpc_lightning.evaluation.ablation.command import ablate
from lpc_lightning.files.json_files import write_json

MISSPELT = "model.betta=1"


def run_at_once(jobs: Sequence[Job], processes: int, on_end: OnCellEnd) -> None:
    """Stand-in for fits: a cell with a misspelt setting makes no step, and every other cell finishes."""
    for job in jobs:
        if f"--{MISSPELT}" in job.record.arguments:
            on_end(job, replace(job.record, status="failed", error="no step"))
            continue
        folder = CellFolder(job.folder)
        record = replace(folder.begin(job.record), status="finished")
        write_json(folder.results, {"metrics": {"val/rewards/accuracies": 0.6}})
        folder.write(record)
        on_end(job, record)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Function that runs `ablate` on a grid of two cells with changes, and returns `ablation.json`."""
    monkeypatch.setattr(cell_runner, "run_locally", run_at_once)
    axes = {"share": {"values": [1, 0.5], "key": "trainer.overfit_batches"}}
    (tmp_path / "trial.yaml").write_text(yaml.safe_dump({"base": ["--trainer.max_epochs=1"], "axes": axes}))

    def run(*changes: str, **settings: Any) -> dict[str, Any]:
        ablate([str(tmp_path / "trial.yaml"), *changes], output=str(tmp_path / "out"), **settings)
        content: dict[str, Any] = json.loads((tmp_path / "out" / "ablation.json").read_text())
        return content

    return run


def test_command_without_cells_is_not_recorded(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    before = run()
    assert before["base"] == ["--trainer.max_epochs=1"]
    assert before["axes"] == {"share": [1, 0.5]}
    assert run("trainer.max_epochs=7", keep_stale=True) == before
    assert run(MISSPELT) == before
    (tmp_path / "out" / "ablation.json").unlink()
    assert run()["axes"] == {"share": [1, 0.5]}


def test_command_that_runs_a_cell_is_recorded(run: Callable[..., dict[str, Any]]) -> None:
    run()
    after = run("share=0.5", "trainer.max_epochs=7")
    assert after["base"] == ["--trainer.max_epochs=1", "--trainer.max_epochs=7"]
    assert after["command"].endswith("share=0.5 trainer.max_epochs=7")
    assert after["axes"] == {"share": [0.5, 1]}


def test_overview_keeps_equal_numbers_apart(run: Callable[..., dict[str, Any]]) -> None:
    """1 is one batch, and 1.0 is all of them."""
    run("share=1")
    assert json.dumps(run("share=1.0")["axes"]) == '{"share": [1.0, 1]}'
