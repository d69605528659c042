"""Which pairs a run will read: far from all where it ends by steps or its batches are limited."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lpc_lightning.data.batching.loading import EvaluationBatches, TrainingBatches


def training_reads(batches: TrainingBatches, trainer: Any) -> set[int]:
    """Pairs that training reads, on all devices, from the run's first step to its last one.

    Args:
        batches: The plan of any of the devices.
        trainer: The trainer, whose settings say when the run ends at the latest.
    """
    epoch_length = _limited(len(batches), trainer.limit_train_batches)
    left = micro_batches(batches, trainer)
    read: set[int] = set()
    epoch = 0
    while left > 0 and epoch_length > 0 and len(read) < batches.pairs:
        taken = min(epoch_length, left)
        read.update(batches.first(int(taken), epoch))
        left -= taken
        epoch += 1
    return read


def micro_batches(batches: TrainingBatches, trainer: Any) -> float:
    """Return how many micro-batches a device takes in the run, at most.

    Args:
        batches: The plan of any of the devices.
        trainer: The trainer, whose settings say when the run ends at the latest.
    """
    left = math.inf
    if trainer.max_steps >= 0:
        left = trainer.max_steps * _longest_window(trainer)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = min(left, trainer.max_epochs * _limited(len(batches), trainer.limit_train_batches))
    return left


def evaluation_reads(pairs: int, batch_size: int, trainer: Any) -> set[int]:
    """Pairs that validation, test or prediction reads, on all devices.

    Args:
        pairs: Pairs that there are.
        batch_size: Pairs in a batch.
        trainer: The trainer, whose command and limits count.
    """
    name = {"fit": "val", "validate": "val"}.get(trainer.state.fn.value, trainer.state.fn.value)
    limit = getattr(trainer, f"limit_{name}_batches")
    plans = [EvaluationBatches(pairs, batch_size, rank, trainer.world_size) for rank in range(trainer.world_size)]
    return {pair for plan in plans for batch in plan.batches[: _limited(len(plan), limit)] for pair in batch}


def _longest_window(trainer: Any) -> int:
    """Most batches that are accumulated for a step."""
    schedules = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
    return max([trainer.accumulate_grad_batches, *(n for each in schedules for n in each.scheduling.values())])


def _limited(batches: int, limit: int | float) -> int:
    """A number of batches, or a share of them, as Lightning reads its `limit_*_batches`."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
