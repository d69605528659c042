"""Tokens per second, seconds per step, and peak memory of a run."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms.base import is_optimizer_step
from lpc_lightning.types import PreferenceBatch

Time = float | torch.cuda.Event
"""Seconds of the process's clock, or an event in a stream of a GPU."""


class ResourceMonitor(Callback):
    """Callback that logs speed and memory of each logged step.

    Metrics: `resources/{tokens_per_second,pairs_per_second,seconds_per_step,peak_memory_gib}`. The time of a step is
    from the arrival of its first batch to the end of its last one, by the device's clock. Validation, checkpoints and
    waiting for data between steps are excluded. Tokens are those that the backbone reads on all devices, without
    padding. Memory is that of the device with the largest use: the allocations of CUDA, or the process's largest
    resident size.

    Args:
        warmup_steps: Number of first steps that the medians exclude.
    """

    def __init__(self, warmup_steps: int = 2) -> None:
        self.warmup_steps = warmup_steps
        self._rows: list[tuple[float, float, float]] = []
        self._steps: list[_Step] = []
        """Steps since the last logged one. Their times are not read yet."""
        self._step = _Step()
        self._peak = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Start the clock at the first batch of a step, and count tokens and pairs."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._step = _Step()
        self._step.start(read_clock(pl_module.device))
        self._step.tokens += batch.tokens
        self._step.pairs += batch.pairs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Stop the clock at the last batch of a step. If the step is logged, read the times and log them."""
        if not is_optimizer_step(trainer, batch_idx):
            return
        self._step.stop(read_clock(pl_module.device))
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
        # Tensors on the CPU, because Lightning copies plain numbers to the device and back.
        metrics = {f"resources/{name}": torch.tensor(value, device="cpu") for name, value in values.items()}
        pl_module.log_dict(metrics, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock until the next batch. A validation may be between two batches of a step."""
        self._step.stop(read_clock(pl_module.device))

    def _read(self, trainer: Trainer) -> None:
        """Read the times of all steps since the last logged one, and sum the counts over devices."""
        steps, self._steps = self._steps, []
        device = trainer.strategy.root_device if trainer.world_size > 1 else torch.device("cpu")
        counts = torch.tensor([[step.tokens, step.pairs] for step in steps], dtype=torch.float64, device=device)
        counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu()
        peak = torch.tensor(peak_memory(trainer.strategy.root_device), device=device)
        self._peak = float(trainer.strategy.reduce(peak, reduce_op="max"))
        for step, (tokens, pairs) in zip(steps, counts.tolist(), strict=True):
            self._rows.append((step.seconds, tokens, pairs))

    def summary(self) -> dict[str, float]:
        """Return medians over the steps after warm-up, and the peak memory up to the last logged step."""
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
    """Times of an optimizer step, and its counts on this device."""

    spans: list[tuple[Time, Time]] = field(default_factory=list)
    """Start and end of each part of the step. A validation divides it."""
    tokens: int = 0
    pairs: int = 0
    _started: Time | None = None

    def start(self, now: Time) -> None:
        """Start the clock, unless it runs."""
        self._started = now if self._started is None else self._started

    def stop(self, now: Time) -> None:
        """Stop the clock, if it runs."""
        if self._started is not None:
            self.spans.append((self._started, now))
            self._started = None

    @property
    def seconds(self) -> float:
        """Seconds of all parts."""
        return sum(seconds_between(*span) for span in self.spans)


def read_clock(device: torch.device) -> Time:
    """Return the current time. On a GPU: an event at the end of all work launched so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: Time, end: Time) -> float:
    """Return the seconds between two values of `read_clock`. For events this waits for the second one."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000
    assert isinstance(start, float)
    assert isinstance(end, float)
    return end - start


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: CUDA's allocations on a GPU, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
