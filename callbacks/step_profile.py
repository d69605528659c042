"""Where the time of a training step goes."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PyTorchProfiler

from lpc_lightning.algorithms.base import is_optimizer_step
from lpc_lightning.callbacks.step_parts import PARTS, StepParts, idle_share
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.markdown import markdown_table
from lpc_lightning.loggers import log_table
from lpc_lightning.types import PreferenceBatch


class StepProfile(Callback):
    """Callback that prints the time of each part of a step, and sends the table to each logger that takes tables.

    Parts: waiting for data, the reference, forward and backward of backbone and head, latent and loss, the optimizer,
    and everything else. They are means over some optimizer steps, and add up to the time of a step. On a GPU times are
    those of the device. The same number of steps after them is run under torch's profiler, for the share of the time in
    which the GPU is idle, unless `trainer.profiler` is `pytorch`. Validation is left out. The results of the run do not
    change.

    Args:
        warmup_steps: Number of first steps that are left out.
        steps: Number of steps.
    """

    def __init__(self, warmup_steps: int = 2, steps: int = 8) -> None:
        for name, value, least in (("warmup_steps", warmup_steps, 0), ("steps", steps, 1)):
            if value < least:
                raise ConfigError(f"StepProfile.{name}: found {value}, expected at least {least}.")
        self.warmup_steps, self.steps = warmup_steps, steps
        self.seconds: dict[str, float] = {}
        """Seconds of a step by part. Empty before the last step is measured."""
        self.idle: float | None = None
        """Share of the time in which the GPU is idle. None on other devices."""
        self._parts: StepParts | None = None
        self._profile: torch.profiler.profile | None = None
        self._start = 0.0
        self._taken = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count steps."""
        self._taken, self.seconds, self.idle = 0, {}, None
        if self.warmup_steps == 0:
            self._parts = StepParts(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Start the batch."""
        if self._parts is not None:
            self._parts.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """End the batch, and start or end the measurement after a step."""
        if self._parts is not None:
            self._parts.end()
        if not is_optimizer_step(trainer, batch_idx):
            return
        self._taken += 1
        if self._taken == self.warmup_steps:
            self._parts = StepParts(trainer, pl_module)
            self._parts.end()
        elif self._taken == self.warmup_steps + self.steps:
            self._read_parts()
            self._start_profile(trainer, pl_module)
            if self._profile is None:
                self._report(trainer)
        elif self._taken == self.warmup_steps + 2 * self.steps and self._profile is not None:
            self._read_profile()
            self._report(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the validation."""
        if self._parts is not None:
            self._parts.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the steps so far if the run is too short."""
        if self._parts is None and self._profile is None:
            return
        self._read_parts()
        self._read_profile()
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the wrappers."""
        self._read_parts()
        self._read_profile()

    def _read_parts(self) -> None:
        parts, self._parts = self._parts, None
        if parts is None:
            return
        parts.close()
        steps = min(self._taken - self.warmup_steps, self.steps)
        if steps > 0:
            batches = parts.seconds()
            self.seconds = {part: sum(batch[part] for batch in batches) / steps for part in PARTS}

    def _start_profile(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # torch has one profiler at a time.
        profiler = trainer.profiler  # type: ignore[attr-defined]  # set by Lightning's connector
        if pl_module.device.type != "cuda" or isinstance(profiler, PyTorchProfiler):
            return
        torch.cuda.synchronize(pl_module.device)
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.start()
        self._start = time.perf_counter()

    def _read_profile(self) -> None:
        profile, self._profile = self._profile, None
        if profile is None:
            return
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self._start
        profile.stop()
        self.idle = idle_share(profile, seconds)

    def _report(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self.seconds:
            return
        step = sum(self.seconds.values())
        rows = [(part, f"{1e3 * value:.2f}", f"{value / step:.1%}") for part, value in self.seconds.items()]
        rows.append(("step", f"{1e3 * step:.2f}", "100.0%"))
        if self.idle is not None:
            rows.append(("GPU idle", "", f"{self.idle:.1%}"))
        print(f"\n{markdown_table(COLUMNS, rows)}\n")
        log_table(trainer, "step_profile", COLUMNS, rows)


COLUMNS = ("part of a step", "ms", "share")
