"""A run that ends in the middle of an epoch is validated all the same."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Has `trainer.max_steps` end with a validation, as `max_epochs` does.

    Lightning validates at the ends of intervals only, so that a run of 150 steps would end without the numbers it was
    made for, and without a checkpoint chosen by them.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for a stop with the last step; the trainer validates before it stops."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
