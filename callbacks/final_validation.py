"""Validation at the end of a run that ends in the middle of an epoch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Callback that validates after the last step of `trainer.max_steps`, as after the last epoch of `max_epochs`.

    Lightning validates only at the end of each validation interval. Without this callback, a run of 150 steps would end
    without a final validation, and no checkpoint could be selected by it.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request a stop at the last step. The trainer validates before it stops."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
