"""Tests that the reference is the published policy even if the module's weights have been trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lpc_lightning.algorithms import DPO
from lpc_lightning.policy import LoRA


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("stored", [True, False], ids=["with the cache", "without"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumed_run_equals_uninterrupted_run(
    precision: Any, stored: bool, small_policy: Any, own_data: Any, fit_run: Any, tmp_path: Path
) -> None:
    def run(ckpt_path: Path | None = None) -> Any:
        save = ModelCheckpoint(
            dirpath=tmp_path / ("resumed" if ckpt_path else "whole"),
            filename="{step}",
            every_n_train_steps=4,
            save_top_k=-1,
        )
        module = DPO(policy=small_policy(), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
        data = own_data()
        return fit_run(module, data, max_epochs=2, callbacks=[save], ckpt_path=ckpt_path, precision=precision)

    whole = run()
    assert abs(whole.losses[-1] - whole.losses[0]) > 0.01, "the policy has changed"
    if not stored:
        shutil.rmtree(tmp_path / "reference")
    resumed = run(tmp_path / "whole" / "step=8.ckpt")
    assert list(resumed.training.values()) == list(whole.training.values())[8:]
    assert all(torch.equal(weight, resumed.weights[name]) for name, weight in whole.weights.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("way", ["by the trainer", "beforehand", "just trained"])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
def test_reference_of_trained_policy_is_published(
    lora: LoRA | None,
    way: str,
    command: str,
    small_policy: Any,
    own_data: Any,
    fit_run: Any,
    tmp_path: Path,
    parts: Any,
) -> None:
    """The cache is empty, and trained weights come from training, a checkpoint or `load_from_checkpoint`."""

    def make(reference: str) -> DPO:
        return DPO(
            policy=small_policy(lora=lora),
            reference=reference,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-2),
            beta=1.0,
        )

    module = make("cached")
    keep = ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="trained")
    fit_run(module, own_data(), max_epochs=1, callbacks=[keep])
    shutil.rmtree(tmp_path / "reference")
    path = tmp_path / "checkpoints" / "trained.ckpt"

    def rewards(reference: str) -> Any:
        loaded, options = module, {}
        if reference == "live" or way == "by the trainer":
            loaded, options = make(reference), {"ckpt_path": path}
        elif way == "beforehand":
            loaded = DPO.load_from_checkpoint(path, policy=small_policy(lora=lora))
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        quiet = {} if command == "predict" else {"verbose": False}
        metrics = getattr(trainer, command)(loaded, datamodule=own_data(), **options, **quiet)
        if command == "predict":
            return torch.cat([batch["rewards/chosen"] for batch in metrics]).tolist()
        return metrics[0][f"{command.replace('validate', 'val')}/rewards/chosen"]

    live, cached = rewards("live"), rewards("cached")
    assert cached == pytest.approx(live, abs=1e-3)
    assert np.abs(live).max() > 0.02
    assert len(parts()) == 1
