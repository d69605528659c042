"""Tests of runs that `EarlyStopping` has ended and that are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import BestAndLast

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Checkpoint directory")]


class Worse(EarlyStopping):
    """Sees its first value only once: every later check is worse."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        metrics["score"] = torch.tensor(-float(trainer.global_step))
        super().on_validation_end(trainer, pl_module)


@pytest.mark.parametrize(
    ("checks", "patience", "steps"), [(None, 2, 33), (2, 2, 6), (2, 0, 4)], ids=["epochs", "first epoch", "no patience"]
)
def test_resume_after_early_stop(
    checks: int | None, patience: int, steps: int, small_policy: Any, fit_run: Any, tmp_path: Path
) -> None:
    """An epoch has 11 steps. The run ends after the first check and `patience` worse ones, at least one."""

    def fit(**settings: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, filename="{step}", monitor="val/loss")
        stop = Worse("score", mode="max", patience=patience, check_on_train_epoch_end=False)
        options: dict[str, Any] = {"max_epochs": 5, "val_check_interval": checks}
        return fit_run(DPO(policy=small_policy()), callbacks=[stop, saver], **options | settings)

    first = fit()
    assert first.trainer.global_step == steps
    with pytest.warns(UserWarning, match=rf"step {steps}, where EarlyStopping on score had ended the run"):
        resumed = fit(ckpt_path=tmp_path / "last.ckpt")
    assert resumed.trainer.global_step == steps
    assert all(torch.equal(first.weights[name], weight) for name, weight in resumed.weights.items())
    # Before the stop, the run goes on as before.
    before = min(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    assert fit(ckpt_path=before).trainer.global_step == steps


class Diverges(EarlyStopping):
    """Sees a value that is not finite at each check."""

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        trainer.callback_metrics["score"] = torch.tensor(float("nan"))
        super()._run_early_stopping_check(trainer)


@pytest.mark.parametrize(("checks", "steps"), [(2, 2), (None, 11)], ids=["within", "at the end"])
@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (lambda: EarlyStopping("val/loss", stopping_threshold=100.0), "Stopping threshold reached: val/loss = "),
        (lambda: EarlyStopping("val/loss", divergence_threshold=0.0), "Divergence threshold reached: val/loss = "),
        (lambda: Diverges("score"), "Monitored metric score = nan is not finite"),
    ],
    ids=["threshold", "divergence", "not finite"],
)
def test_resume_after_stop_in_first_epoch(
    checks: int | None, steps: int, stop: Any, reason: str, small_policy: Any, fit_run: Any, tmp_path: Path
) -> None:
    """Its number is 0, as that of no epoch. A check at the end of an epoch follows the validation."""

    def fit(**settings: Any) -> Any:
        callbacks = [stop(), BestAndLast("val/loss", "min")]
        options: dict[str, Any] = {"max_epochs": 3, "val_check_interval": checks, "default_root_dir": tmp_path}
        return fit_run(DPO(policy=small_policy()), callbacks=callbacks, **options | settings)

    assert fit().trainer.global_step == steps
    (last,) = tmp_path.rglob("last.ckpt")
    with pytest.warns(UserWarning, match=rf"step {steps}, where EarlyStopping on .* had ended the run \({reason}"):
        assert fit(ckpt_path=last).trainer.global_step == steps


def test_resume_before_early_stop_counts_all_checks(small_policy: Any, fit_run: Any, tmp_path: Path) -> None:
    """A run that is resumed after its second epoch ends with the same epoch as an uninterrupted one."""

    class Keep(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2 and trainer.ckpt_path is None:
                (last,) = tmp_path.rglob("last.ckpt")
                last.rename(tmp_path / "second.ckpt")

    def fit(**settings: Any) -> Any:
        stop = EarlyStopping("val/rewards/accuracies", mode="max", min_delta=2.0, patience=3)
        callbacks = [stop, Keep(), BestAndLast("val/loss", "min")]
        options: dict[str, Any] = {"max_epochs": 9, "default_root_dir": tmp_path}
        return fit_run(DPO(policy=small_policy()), callbacks=callbacks, **options | settings)

    assert fit().trainer.global_step == fit(ckpt_path=tmp_path / "second.ckpt").trainer.global_step == 4 * 11


def test_resume_after_early_stop_min_epochs(small_policy: Any, fit_run: Any, tmp_path: Path) -> None:
    def fit(**settings: Any) -> Any:
        saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", monitor="val/loss")
        stop = Worse("score", mode="max", patience=1, check_on_train_epoch_end=False)
        return fit_run(DPO(policy=small_policy()), callbacks=[stop, saver], max_epochs=5, min_epochs=3, **settings)

    assert fit().trainer.global_step == fit(ckpt_path=tmp_path / "step=22.ckpt").trainer.global_step == 33
