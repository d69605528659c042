"""Tokens per second, seconds per step, and peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms.accumulation import is_optimizer_step
from lpc_lightning.types import PreferenceBatch


class ResourceMonitor(Callback):
    """Logs `resources/{tokens_per_second,pairs_per_second,seconds_per_step,peak_memory_gib}` with each optimizer step.

    Time is that from the arrival of a step's first batch to the end of its last; what lies between steps (validation,
    checkpoints, waiting for data) is left out. Tokens are those that the backbone reads, without padding, on all
    devices. Memory is that of the device that took most: the process's largest resident size, or what CUDA allocated.

    Args:
        warmup_steps: First steps that the medians leave out.
    """

    def __init__(self, warmup_steps: int = 2) -> None:
        self.warmup_steps = warmup_steps
        self._rows: list[tuple[float, float, float]] = []
        self._start = self._tokens = self._pairs = self._peak = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Start the clock with a step's first batch, and count."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._start, self._tokens, self._pairs = time.perf_counter(), 0.0, 0.0
        self._tokens += batch.tokens
        self._pairs += batch.pairs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Stop it with the last one, and log."""
        if not is_optimizer_step(trainer, batch_idx):
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._start
        mine = torch.tensor([self._tokens, self._pairs], device=pl_module.device)
        tokens, pairs = trainer.strategy.reduce(mine, reduce_op="sum").tolist()
        peak = torch.tensor(peak_memory(pl_module.device), device=pl_module.device)
        self._peak = float(trainer.strategy.reduce(peak, reduce_op="max"))
        self._rows.append((seconds, tokens, pairs))
        values = {
            "tokens_per_second": tokens / seconds,
            "pairs_per_second": pairs / seconds,
            "seconds_per_step": seconds,
            "peak_memory_gib": self._peak,
        }
        pl_module.log_dict({f"resources/{name}": value for name, value in values.items()}, batch_size=1)

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


def peak_memory(device: torch.device) -> float:
    """Peak so far in GiB: CUDA's allocations on a GPU, the process's resident size elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
