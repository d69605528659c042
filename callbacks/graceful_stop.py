"""SIGTERM ends a run at the next whole step, with a checkpoint, or at once where there has been none."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.algorithms.accumulation import is_optimizer_step


class GracefulStop(Callback):
    """On SIGTERM, finish the optimizer step, save `stopped.ckpt`, and stop; before the first step, stop at once.

    A run that is still preparing (warm-starting its latent, which may take an hour) has nothing to save.
    Lightning's own handler stops after the batch: in the middle of an accumulation window, whose gradients no
    checkpoint holds. A run resumed from `stopped.ckpt` goes on as if it had never stopped.

    Raises:
        SIGTERMException: After the checkpoint is written, or in the midst of what comes before the first step. The
            command line turns it into exit code 143.
    """

    def __init__(self) -> None:
        """Listen from `on_train_start` on."""
        self._requested = self._stepping = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over from Lightning, which puts the previous handler back after the run."""
        self._requested = self._stepping = False
        signal.signal(signal.SIGTERM, self._request)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a step is under way."""
        self._stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop where the batch closed a step."""
        requested = trainer.strategy.reduce_boolean_decision(self._requested, all=False)
        if not requested or not is_optimizer_step(trainer, batch_idx):
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "stopped.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"SIGTERM: stopped after step {trainer.global_step}. Go on with --ckpt_path {path}")
        raise SIGTERMException

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if not self._stepping:
            raise SIGTERMException
