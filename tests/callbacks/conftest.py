"""Fixture: runs of a tiny policy with callbacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import TinyPolicy


@pytest.fixture
def fitted(tmp_path: Path, cache_dir: Path) -> Callable[..., Trainer]:
    """Function that runs LPC-DPO and returns the trainer: 20 pairs, 2 in a micro-batch, 2 micro-batches in a step."""

    def fit(*callbacks: Callback, **trainer: Any) -> Trainer:
        sizes = {"train_pairs": 20, "validation_pairs": 6, "test_pairs": 6, "batch_size": 2}
        data = SyntheticPreferences(**sizes, cache_dir=str(cache_dir))
        policy = TinyPolicy(width=16, layers=1, heads=2)
        settings: dict[str, Any] = {
            "logger": CSVLogger(tmp_path, name="", version="run"),
            "accumulate_grad_batches": 2,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "accelerator": "cpu",
        }
        ckpt_path = trainer.pop("ckpt_path", None)
        latent = trainer.pop("latent", MarginalSpace(num_codes=4, init_logit_std=0.5))
        finished = Trainer(callbacks=list(callbacks), **(settings | trainer))
        finished.fit(DPO(policy=policy, latent=latent), data, ckpt_path=ckpt_path)
        return finished

    return fit
