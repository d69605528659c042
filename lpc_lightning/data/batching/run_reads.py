"""Pairs that a run reads, which can be few if the number of steps or batches is limited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lpc_lightning.data.batching.loading import EvaluationBatches, TrainingBatches


def training_reads(batches: TrainingBatches, trainer: Any) -> set[int]:
    """Return the pairs that training reads on all devices, from the first step of the run to the last.

    Args:
        batches: Plan of any device.
        trainer: Trainer whose settings limit the length of the run.
    """
    epoch_length = _limited(len(batches), trainer.limit_train_batches)
    left = micro_batches(batches, trainer)
    read: set[int] = set()
    epoch = 0
    while left > 0 and epoch_length > 0 and len(read) < len(batches.pairs):
        taken = min(epoch_length, left)
        read.update(batches.first(int(taken), epoch))
        left = 0 if batches.repeats else left - taken
        epoch += 1
    return read


def micro_batches(batches: TrainingBatches, trainer: Any) -> float:
    """Return the maximum number of micro-batches of a device in the run.

    Args:
        batches: Plan of any device.
        trainer: Trainer whose settings limit the length of the run.
    """
    left = math.inf
    if trainer.max_steps >= 0:
        left = trainer.max_steps * _longest_window(trainer)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        left = min(left, trainer.max_epochs * _limited(len(batches), trainer.limit_train_batches))
    return left


def evaluation_reads(plans: Sequence[EvaluationBatches], trainer: Any) -> set[int]:
    """Return the pairs that validation, test or prediction reads on all devices.

    Args:
        plans: Plan of each device.
        trainer: Trainer with the command and the limits.
    """
    name = {"fit": "val", "validate": "val"}.get(trainer.state.fn.value, trainer.state.fn.value)
    limit = getattr(trainer, f"limit_{name}_batches")
    return {pair for plan in plans for batch in plan.batches[: _limited(len(plan), limit)] for pair in batch}


def _longest_window(trainer: Any) -> int:
    """Return the maximum number of batches that are accumulated for a step."""
    schedules = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
    return max([trainer.accumulate_grad_batches, *(n for each in schedules for n in each.scheduling.values())])


def _limited(batches: int, limit: int | float) -> int:
    """Apply a limit to a number of batches. An int is a number and a float a share, as in Lightning."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
