"""Tokens per second, seconds per step, and peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms.accumulation import is_optimizer_step
from lpc_lightning.types import PreferenceBatch

Time = float | torch.cuda.Event
"""Seconds of the process's clock, or an event of a GPU's stream."""


class ResourceMonitor(Callback):
    """Logs `resources/{tokens_per_second,pairs_per_second,seconds_per_step,peak_memory_gib}` of each logged step.

    Time is that from the arrival of a step's first batch to the end of its last, on the device's own clock; what lies
    between steps (validation, checkpoints, waiting for data) is left out. Tokens are those that the backbone reads,
    without padding, on all devices. Memory is that of the device that took most: the process's largest resident size,
    or what CUDA allocated.

    Args:
        warmup_steps: First steps that the medians leave out.
    """

    def __init__(self, warmup_steps: int = 2) -> None:
        self.warmup_steps = warmup_steps
        self._rows: list[tuple[float, float, float]] = []
        self._steps: list[_Step] = []
        """Steps since the last logged one, whose times have not been read."""
        self._step = _Step()
        self._peak = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Start the clock with a step's first batch, and count."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._step = _Step(start=_now(pl_module.device))
        self._step.tokens += batch.tokens
        self._step.pairs += batch.pairs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Stop it with the last one; read the clock and log where the step is logged."""
        if not is_optimizer_step(trainer, batch_idx):
            return
        self._step.end = _now(pl_module.device)
        self._steps.append(self._step)
        if not outputs["logged"]:
            return
        self._read(trainer)
        seconds, tokens, pairs = self._rows[-1]
        values = {
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": pairs / seconds,
            "seconds_per_step": seconds,
            "peak_memory_gib": self._peak,
        }
        # Tensors on the CPU: Lightning would copy plain numbers to the device, and back again to log them.
        metrics = {f"resources/{name}": torch.tensor(value, device="cpu") for name, value in values.items()}
        pl_module.log_dict(metrics, batch_size=1)

    def _read(self, trainer: Trainer) -> None:
        """Read the clock for all steps since the last logged one, and add up over devices."""
        steps, self._steps = self._steps, []
        device = trainer.strategy.root_device if trainer.world_size > 1 else torch.device("cpu")
        counts = torch.tensor([[step.tokens, step.pairs] for step in steps], dtype=torch.float64, device=device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu()
        peak = torch.tensor(peak_memory(trainer.strategy.root_device), device=device)
        self._peak = float(trainer.strategy.reduce(peak, reduce_op="max"))
        for step, (tokens, pairs) in zip(steps, counts.tolist(), strict=True):
            self._rows.append((_seconds(step.start, step.end), tokens, pairs))

    def summary(self) -> dict[str, float]:
        """Medians over the steps after warm-up, and the peak up to the last step."""
        rows = self._rows[self.warmup_steps :] or self._rows
        if not rows:
            return {}
        return {
            "tokens_per_second": statistics.median(tokens / seconds for seconds, tokens, _ in rows),
            "pairs_per_second": statistics.median(pairs / seconds for seconds, _, pairs in rows),
            "seconds_per_step": statistics.median(seconds for seconds, _, _ in rows),
            "peak_memory_gib": self._peak,
        }


@dataclass(slots=True)
class _Step:
    """When an optimizer step began and ended, and what it read on this device."""

    start: Time = 0.0
    end: Time = 0.0
    tokens: int = 0
    pairs: int = 0


def _now(device: torch.device) -> Time:
    """The present, or on a GPU the moment at which it will have done all that was launched so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: Time, end: Time) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start


def peak_memory(device: torch.device) -> float:
    """Peak so far in GiB: CUDA's allocations on a GPU, the process's resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
