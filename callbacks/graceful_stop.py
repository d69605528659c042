"""Stop on SIGTERM between two optimizer steps, with a checkpoint, or immediately before the first step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.loggers import run_folder


class GracefulStop(Callback):
    """Callback that handles SIGTERM: finish the optimizer step, save `stopped.ckpt`, and stop.

    The step's metrics are logged before the stop. A validation that has begun is repeated by the resumed run. Before
    the first step, the run stops immediately. It has nothing to save, and a warm start of the latent may take an hour.
    Lightning's own handler stops after the current batch. This can be within an accumulation window, whose gradients
    are not in the checkpoint. A run resumed from `stopped.ckpt` ends like an uninterrupted run. A run that has made its
    last step, by `trainer.max_steps` or with `FinalValidation`, ends as without the signal.

    Raises:
        SIGTERMException: After the checkpoint is written, or before the first step. The command line turns it into exit
            code 143.
    """

    def __init__(self) -> None:
        """Set the initial state. The signal handler is installed when the fit starts."""
        self._requested = self._stepping = False
        self._processes: dist.ProcessGroup | None = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handler, which would wait for the first batch."""
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handler. Lightning restores the previous handler after the run."""
        self._listen()
        self._processes = None
        if trainer.world_size > 1 and dist.is_initialized():
            # A process group of the CPUs: with that of the devices, every step would wait for the devices.
            self._processes = dist.new_group(backend="gloo")
            # Before each batch, Lightning broadcasts whether its own handler was called, and waits for the device. It
            # has no setting for this, and its handler is not in use.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save and stop if a stop is requested and no step has begun."""
        self._stepping = True
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._stop_if_requested(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Save and stop if a stop is requested during a validation, except for one at the end of the run.

        With `WeightAveraging` the validation ends first: until then the module has the averaged weights.
        """
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._stepping = True
            is_last = trainer.should_stop or trainer.global_step == trainer.max_steps
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
            has_averages = any(isinstance(callback, WeightAveraging) for callback in callbacks)
            if not (is_last or has_averages):
                self._stop_if_requested(trainer)

    def _listen(self) -> None:
        self._requested = self._stepping = False
        if threading.current_thread() is threading.main_thread():  # Python allows no handler elsewhere
            signal.signal(signal.SIGTERM, self._request)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        if not self._requested_anywhere():
            return
        path = run_folder(trainer) / "checkpoints" / "stopped.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
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
