"""SIGTERM ends a run at the next whole step, with a checkpoint, or at once where there has been none."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
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
        self._processes: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal over from Lightning, which puts the previous handler back after the run."""
        self._requested = self._stepping = False
        signal.signal(signal.SIGTERM, self._request)
        self._processes = None
        if trainer.world_size > 1 and dist.is_initialized():
            # Between the CPUs: over the devices' own connection, every step would wait for the devices.
            self._processes = dist.new_group(backend="gloo")
            # Lightning asks the same for its own handler before each batch, by a number from the device.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a step is under way."""
        self._stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop where the batch closed a step."""
        if not is_optimizer_step(trainer, batch_idx) or not self._requested_anywhere():
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "stopped.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"SIGTERM: stopped after step {trainer.global_step}. Go on with --ckpt_path {path}")
        raise SIGTERMException

    def _requested_anywhere(self) -> bool:
        """True if any process has got the signal; the same in all of them."""
        if self._processes is None:
            return self._requested
        requested = torch.tensor(int(self._requested), device="cpu")
        dist.all_reduce(requested, dist.ReduceOp.MAX, group=self._processes)
        return bool(requested)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if not self._stepping:
            raise SIGTERMException
