"""Stop on SIGTERM after the current optimizer step, with a checkpoint, or immediately before the first step."""

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

from lpc_lightning.algorithms.base import is_optimizer_step


class GracefulStop(Callback):
    """Callback that handles SIGTERM: finish the optimizer step, save `stopped.ckpt`, and stop.

    Before the first step, the run stops immediately. It has nothing to save, and a warm start of the latent may take an
    hour. Lightning's own handler stops after the current batch. This can be within an accumulation window, whose
    gradients are not in the checkpoint. A run resumed from `stopped.ckpt` ends like an uninterrupted run.

    Raises:
        SIGTERMException: After the checkpoint is written, or before the first step. The command line turns it into exit
            code 143.
    """

    def __init__(self) -> None:
        """Set the initial state. The signal handler is installed in `on_train_start`."""
        self._requested = self._stepping = False
        self._processes: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handler. Lightning restores the previous handler after the run."""
        self._requested = self._stepping = False
        signal.signal(signal.SIGTERM, self._request)
        self._processes = None
        if trainer.world_size > 1 and dist.is_initialized():
            # A process group of the CPUs: with that of the devices, every step would wait for the devices.
            self._processes = dist.new_group(backend="gloo")
            # Lightning does the same for its own handler before each batch, and waits for the device each time.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record that the first step has started."""
        self._stepping = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if a stop is requested and the batch ends an optimizer step."""
        if not is_optimizer_step(trainer, batch_idx) or not self._requested_anywhere():
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "stopped.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"SIGTERM: stopped after step {trainer.global_step}. Resume with --ckpt_path {path}")
        raise SIGTERMException

    def _requested_anywhere(self) -> bool:
        """Return true if any process has received the signal. All processes return the same value."""
        if self._processes is None:
            return self._requested
        requested = torch.tensor(int(self._requested), device="cpu")
        dist.all_reduce(requested, dist.ReduceOp.MAX, group=self._processes)
        return bool(requested)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if not self._stepping:
            raise SIGTERMException
