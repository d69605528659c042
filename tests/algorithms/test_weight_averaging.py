"""Tests that a run with Lightning's averages of the weights resumes to the last bit, also with frozen weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import GracefulStop
from lpc_lightning.policy import LoRA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


class Terminated(Callback):
    """Sends SIGTERM to the process at the start of the validation after step 3."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_averaged_run_resumes(small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path) -> None:
    def fit(name: str, *callbacks: Callback, ckpt_path: Path | None = None) -> Any:
        module = DPO(
            policy=small_policy(lora=LoRA(rank=2, alpha=4)),
            optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2),
        )
        saver = ModelCheckpoint(tmp_path / name, "step-{step}", every_n_train_steps=1, save_top_k=-1)
        averaged = [EMAWeightAveraging(decay=0.7), *callbacks, GracefulStop(), saver]
        limits: dict[str, Any] = {"max_steps": 6, "val_check_interval": 3, "default_root_dir": tmp_path / name}
        return fit_run(module, small_data(), callbacks=averaged, ckpt_path=ckpt_path, **limits)

    whole = fit("whole")
    with pytest.raises(SIGTERMException):
        fit("terminated", Terminated())
    for checkpoint in ("whole/step-step=2.ckpt", "terminated/checkpoints/stopped.ckpt"):
        stored = torch.load(tmp_path / checkpoint, weights_only=True)
        assert stored["current_model_state"].keys() == stored["state_dict"].keys(), checkpoint
        assert all("lora" in name for name in stored["state_dict"]), checkpoint
        resumed = fit(checkpoint.replace("/", "-"), ckpt_path=tmp_path / checkpoint)
        assert [name for name, weight in whole.weights.items() if not torch.equal(resumed.weights[name], weight)] == []
        assert list(resumed.training.values())[-1] == list(whole.training.values())[-1], checkpoint
