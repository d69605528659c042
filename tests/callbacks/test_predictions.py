"""Tests of the files of `predict`."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lpc_lightning.callbacks import WritePredictions
from lpc_lightning.loggers import run_folder


def test_files_of_further_devices_are_removed(tmp_path: Path) -> None:
    """An earlier run in the same folder had three devices. Its pairs would be read twice."""
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False)
    for rank in range(3):
        (run_folder(trainer) / f"predictions_{rank}.jsonl").write_text("{}")
    WritePredictions().on_predict_start(trainer, LightningModule())
    assert [path.name for path in tmp_path.glob("predictions_*.jsonl")] == ["predictions_0.jsonl"]


def test_files_of_other_names_stay(tmp_path: Path) -> None:
    """Copies of a user, and a file of a year, are not those of an earlier run."""
    trainer = Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False)
    own = [f"predictions_{name}.jsonl" for name in ("before", "2024", "-1", "01", "1_copy")]
    for name in (*own, "predictions_0.jsonl", "predictions_1.jsonl"):
        (run_folder(trainer) / name).write_text("{}")
    WritePredictions().on_predict_start(trainer, LightningModule())
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == sorted([*own, "predictions_0.jsonl"])
