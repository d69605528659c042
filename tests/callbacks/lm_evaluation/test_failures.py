"""Tests of failed tasks, failed evaluations and signals: the training and its checkpoints remain."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.callbacks import GracefulStop, LMEvaluation
from lpc_lightning.evaluation.benchmarks.results import read_results
from tests.callbacks.lm_evaluation.conftest import write_task


def test_failed_task(fit, task, tmp_path) -> None:
    broken = write_task(tmp_path, "broken", "raise LookupError('no')")
    evaluation = LMEvaluation([broken, task], limit=2, every_n_steps=2, step_limit=2)
    saving = ModelCheckpoint(filename="last")
    with pytest.warns(UserWarning, match="broken has no scores: LookupError: no"):
        trainer = fit("run", evaluation, saving)
    assert trainer.global_step == 5
    assert torch.load(saving.best_model_path, weights_only=True)["global_step"] == 5
    for folder in (Path(), Path("step_2"), Path("step_4")):
        results = read_results(tmp_path / "run" / "lm_eval" / folder)
        assert set(results.metrics) == {"numbers"}
        assert results.failures == {"broken": "LookupError: no (own.py, line 2)"}


def test_failed_evaluation(fit, tmp_path, capsys) -> None:
    """A data file is removed after the start of the training."""
    folder = tmp_path / "data" / "arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").touch()

    class Remove(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            (folder / "test.jsonl").unlink()

    with pytest.warns(UserWarning, match="arc_easy has no scores: data_dir: found no file arc/ARC-Easy/test.jsonl"):
        trainer = fit("run", Remove(), LMEvaluation(["arc_easy"], str(tmp_path / "data"), every_n_steps=2))
    assert trainer.global_step == 5
    assert "test.jsonl" in read_results(tmp_path / "run" / "lm_eval").failures["arc_easy"]
    assert "failed" in capsys.readouterr().out
    assert all(part.training for part in trainer.lightning_module.policy.modules())


def test_failed_writing_of_results(fit, task, tmp_path) -> None:
    class Block(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            (tmp_path / "run" / "lm_eval").write_text("a file in place of the folder")

    with pytest.warns(UserWarning, match="could not write the results"):
        trainer = fit("run", Block(), LMEvaluation([task], limit=2))
    assert trainer.global_step == 5


@pytest.mark.slow
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit"])
def test_interrupt_keeps_all_checkpoints(error, fit, tmp_path) -> None:
    """`save_last` writes at the end of training, after all other callbacks. The benchmarks run after that."""
    task = write_task(tmp_path, "interrupted", f"raise {error}")
    saving = ModelCheckpoint(every_n_train_steps=1000, save_last=True)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit("run", LMEvaluation([task]), saving)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C after the first one
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 5
    assert not (tmp_path / "run" / "lm_eval").exists()


def test_sigterm_during_the_evaluation(fit, task, tmp_path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); return {'acc': 1.0}"
    task_with_sigterm = write_task(tmp_path, "sigterm", code)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        fit("run", GracefulStop(), LMEvaluation([task_with_sigterm], every_n_steps=2, step_limit=2))
    stopped = torch.load(tmp_path / "run" / "checkpoints" / "stopped.ckpt", weights_only=True)
    assert stopped["global_step"] == 2
    assert (tmp_path / "run" / "lm_eval" / "step_2" / "results.json").is_file()

    class AtTheEnd(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.handler = signal.getsignal(signal.SIGTERM)

    end = AtTheEnd()
    fit("other", GracefulStop(), end, LMEvaluation([task], limit=2))
    assert end.handler == before


def test_missing_data_is_reported_before_training(fit, tmp_path) -> None:
    task = write_task(tmp_path, "elsewhere")
    path = Path(task)
    path.write_text(path.read_text().replace("dataset_path: json", "dataset_path: missing/data"))
    early: list[str] = []

    class Start(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            early.extend(str(warning.message) for warning in record)

    with pytest.warns(UserWarning, match="elsewhere.yaml (will have|has) no scores") as record:
        fit("run", Start(), LMEvaluation([task]))
    assert any("elsewhere.yaml will have no scores" in message for message in early)
