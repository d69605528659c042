"""Windows: the micro-batches whose gradients are accumulated for one optimizer step."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lpc_lightning.data.batching.loading import TrainingLoader


def is_optimizer_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps after this micro-batch of the epoch: its window is full, or the epoch ends."""
    number = batch_idx + 1
    return number % trainer.accumulate_grad_batches == 0 or number == trainer.num_training_batches


def is_logged(trainer: Trainer, batch_idx: int) -> bool:
    """Return True if metrics of the window of this micro-batch are computed. The window has not been stepped yet.

    These are the windows of every `trainer.log_every_n_steps`-th step, which loggers write, of the first and the last
    step of a run, and of the last step of an epoch, whose values callbacks may read. The CPU would wait for the device
    to read those of other steps.
    """
    step = trainer.global_step + 1
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's connector
    window = trainer.accumulate_grad_batches
    ends_epoch = batch_idx // window == (trainer.num_training_batches - 1) // window
    return ends_epoch or step in (1, trainer.max_steps) or (every > 0 and step % every == 0)


def share_of_window(trainer: Trainer, pairs: int, batch_idx: int) -> float:
    """What makes the accumulated loss the mean over the window's pairs, as a factor of a micro-batch's own mean.

    The trainer divides by `accumulate_grad_batches`, also where a micro-batch or the epoch's last window is short.

    Args:
        trainer: The trainer. Of loaders other than ours nothing is known: 1.
        pairs: Pairs in the micro-batch.
        batch_idx: Its number in the epoch, from 0.
    """
    loader, window = trainer.train_dataloader, trainer.accumulate_grad_batches
    if window == 1 or not isinstance(loader, TrainingLoader):
        return 1.0
    start = batch_idx - batch_idx % window
    end = min(start + window, int(trainer.num_training_batches))
    return pairs * window / sum(loader.batch_sizes[start:end])
