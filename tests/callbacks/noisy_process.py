"""Train on noisy labels as one of two processes, and write which pairs were flipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import LabelFlipNoise
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.policy import TinyPolicy


class FlipRecorder(Callback):
    """Callback that stores which pairs are flipped."""

    def __init__(self) -> None:
        self.flipped: dict[str, bool] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.flipped |= dict(zip(batch.ids, batch.flipped.tolist(), strict=True))


def train(folder: Path) -> None:
    """Train, and write flips and metrics to `folder`."""
    recorder = FlipRecorder()
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        default_root_dir=folder,
        callbacks=[recorder, LabelFlipNoise(rate=0.4)],
        **quiet,
    )
    data = SyntheticPreferences(train_pairs=40, validation_pairs=0, batch_size=10, cache_dir=str(folder / "cache"))
    trainer.fit(DPO(policy=TinyPolicy(width=16, layers=1, heads=2)), data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    result = {"flipped": recorder.flipped, "metrics": metrics}
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))
