"""Gradient accumulation. A window is the group of micro-batches whose gradients make one optimizer step."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lpc_lightning.data.batching.loading import TrainingLoader


def is_optimizer_step(trainer: Trainer, batch_idx: int) -> bool:
    """Return True if the optimizer steps after this micro-batch: its window is full, or the epoch ends."""
    number = batch_idx + 1
    return number % trainer.accumulate_grad_batches == 0 or number == trainer.num_training_batches


def is_logged(trainer: Trainer, batch_idx: int) -> bool:
    """Return True if the step of this micro-batch is logged. Call it before the step is taken.

    Logged are every `trainer.log_every_n_steps`-th step, which loggers write, the first and the last step of the run,
    and the last step of each epoch, whose values callbacks may read. Metrics of other steps are not computed, because
    reading them would make the CPU wait for the device.
    """
    step = trainer.global_step + 1
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's connector
    window = trainer.accumulate_grad_batches
    ends_epoch = batch_idx // window == (trainer.num_training_batches - 1) // window
    return ends_epoch or step in (1, trainer.max_steps) or (every > 0 and step % every == 0)


def window_weight(trainer: Trainer, pairs: int, batch_idx: int) -> float:
    """Return the factor of a micro-batch's mean loss that makes the window's loss the mean over its pairs.

    The trainer divides by `accumulate_grad_batches`, even if a micro-batch or the epoch's last window is short.

    Args:
        trainer: The trainer. The factor is 1 if its loader is not a `TrainingLoader`, whose batch sizes are known.
        pairs: Number of pairs in the micro-batch.
        batch_idx: Number of the micro-batch in the epoch, from 0.
    """
    loader, window = trainer.train_dataloader, trainer.accumulate_grad_batches
    if window == 1 or not isinstance(loader, TrainingLoader):
        return 1.0
    start = batch_idx - batch_idx % window
    end = min(start + window, int(trainer.num_training_batches))
    return pairs * window / sum(loader.batch_sizes[start:end])
