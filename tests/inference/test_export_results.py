"""Tests of the results of a run in the model card of its export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lpc_lightning.inference.export import export

pytestmark = pytest.mark.slow


@pytest.fixture
def run(fitted: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a run folder without a latent, whose files may be changed."""
    return Path(shutil.copytree(fitted().parents[1], tmp_path / "runs" / "version_0"))


def card(checkpoint: Path) -> str:
    return (export(str(checkpoint), str(checkpoint.parent / "exported")) / "README.md").read_text()


@pytest.mark.parametrize("content", ["", '{"steps": 1, "validation_after"', "[]"])
def test_export_of_a_run_with_damaged_summary(content: str, run: Path) -> None:
    (run / "summary.json").write_text(content)
    with pytest.warns(UserWarning, match=r"version_0/summary\.json: found .* The model card is without it"):
        text = card(run / "checkpoints" / "best.ckpt")
    assert "None lay in the run's folder when this was exported." in text


def test_export_shows_benchmarks_of_its_run_only(run: Path) -> None:
    """Other runs lie beside a checkpoint outside a run folder. The results of a cell have another form."""
    checkpoint = run / "checkpoints" / "best.ckpt"
    for folder, metrics in ((run / "of_run", {"copa": {"acc": 0.625}}), (run / "cell", {"val/loss": 0.5})):
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
    assert "| copa | acc | 0.625 |" in " ".join(card(checkpoint).split())
    (run / "summary.json").unlink()
    alone = run.parent / "mine.ckpt"
    shutil.copy(checkpoint, alone)
    assert "None lay in the run's folder when this was exported." in card(alone)
