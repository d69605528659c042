"""Validation at the end of a run."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Callback that validates after the last step of a run, by `trainer.max_steps` or by `max_epochs`.

    It does so whatever `trainer.min_epochs` and `min_steps` are: after the last step, nothing is left to train.

    Lightning validates only at the end of each validation interval. Without this callback, a run of 150 steps would end
    without a final validation, and so would an epoch of 150 batches with an interval of 100, and a run of three epochs
    with `trainer.check_val_every_n_epoch` 2. No checkpoint of the end could be selected, and the last metrics would be
    those of an earlier state.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Store the interval in epochs, and the least numbers of epochs and steps."""
        loop = trainer.fit_loop
        self._stored = trainer.check_val_every_n_epoch, loop.min_epochs, loop.epoch_loop.min_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Request a stop at the last step. The trainer validates before it stops."""
        ends_epoch = batch_idx + 1 == trainer.num_training_batches
        if trainer.global_step == trainer.max_steps or (ends_epoch and trainer.current_epoch + 1 == trainer.max_epochs):
            trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1  # in any other epoch, Lightning does not validate
            # Nor before its least number of epochs, of which the last one is not counted yet.
            trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the interval and the least numbers."""
        loop = trainer.fit_loop
        trainer.check_val_every_n_epoch, loop.min_epochs, loop.epoch_loop.min_steps = self._stored
