"""The trainer's settings for step size and run length, and their comparison with a resumed checkpoint."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from lpc_lightning.data.batching.loading import NEW_RUN
from lpc_lightning.errors import ConfigError

LENGTH_SETTINGS = ("max_epochs", "max_steps", "limit_train_batches")
"""Settings of the trainer that determine when training ends."""


def run_length(trainer: Trainer) -> dict[str, Any]:
    """Return the settings that a checkpoint stores, by name."""
    schedule = _accumulation(trainer)
    # By epoch: the trainer's number holds for the current epoch only.
    accumulated: Any = trainer.accumulate_grad_batches if schedule is None else schedule.scheduling
    return {"accumulate_grad_batches": accumulated, **{name: getattr(trainer, name) for name in LENGTH_SETTINGS}}


def total_steps(trainer: Trainer) -> float:
    """Return the number of optimizer steps of a run, whatever each epoch accumulates. Infinity if it has no end."""
    steps, schedule = trainer.estimated_stepping_batches, _accumulation(trainer)
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if schedule is None or epochs is None or epochs < 0 or math.isinf(batches):
        return steps
    windows = (schedule.get_accumulate_grad_batches(epoch) for epoch in range(max(epochs, 1)))
    steps = sum(math.ceil(batches / window) for window in windows)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def set_accumulation(trainer: Trainer) -> None:
    """Set the accumulation of the current epoch. Lightning does not if it resumes within an epoch."""
    if (schedule := _accumulation(trainer)) is not None:
        trainer.accumulate_grad_batches = schedule.get_accumulate_grad_batches(trainer.current_epoch)


def check_windows(trainer: Trainer) -> None:
    """Refuse a strategy that accumulates by itself if an epoch before the last ends within a window.

    DeepSpeed's count of micro-batches goes on in the next epoch, while Lightning's starts again.

    Raises:
        ConfigError: The micro-batches of an epoch are no multiple of `accumulate_grad_batches`.
    """
    batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
    if not trainer.strategy.handles_gradient_accumulation or math.isinf(batches) or batches % window == 0:
        return
    whole = int(batches) // window
    if trainer.max_epochs == 1 or 0 <= trainer.max_steps <= whole:
        return
    raise ConfigError(
        f"trainer.accumulate_grad_batches: found {window}, and {batches} micro-batches in an epoch on each device, "
        f"expected a multiple of {window}: {type(trainer.strategy).__name__} would go on with the same step in the "
        "next epoch, while the schedules count a step at the end of each. Set "
        + (f"trainer.limit_train_batches to {whole * window}, or " if whole else "")
        + "trainer.accumulate_grad_batches or data.batch_size so that it divides."
    )


def _accumulation(trainer: Trainer) -> GradientAccumulationScheduler | None:
    """Return the callback that sets the accumulation of each epoch, if there is one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    return next((each for each in callbacks if isinstance(each, GradientAccumulationScheduler)), None)


def compare_run_length(trainer: Trainer, before: dict[str, Any]) -> None:
    """Refuse to resume with another step size, and warn if the run ends at another step, which may be intended.

    Args:
        trainer: The trainer of the resumed run.
        before: `run_length` of the run that wrote the checkpoint.

    Raises:
        ConfigError: `accumulate_grad_batches` differs.
    """
    now = run_length(trainer)
    name = "accumulate_grad_batches"
    if now[name] != before[name]:
        raise ConfigError(
            f"trainer.{name}: found {now[name]}, expected {before[name]} as in the checkpoint. Resume with the same "
            f"value, or {NEW_RUN}."
        )
    if changes := [
        f"{name} {now[name]} (before: {before[name]})" for name in LENGTH_SETTINGS if now[name] != before[name]
    ]:
        rank_zero_warn(
            f"resume: found trainer.{', trainer.'.join(changes)}. From here on, the schedules of the learning rate, g "
            f"and tau are those of a run of {total_steps(trainer)} steps."
        )
        _set_learning_rates(trainer)


def _set_learning_rates(trainer: Trainer) -> None:
    """Set the learning rates of the next step. The checkpoint holds those of the schedule of the run before."""
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, LambdaLR):
            groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, rate, factor in groups:
                group["lr"] = rate * factor(schedule.last_epoch)


def restore_early_stop(trainer: Trainer) -> None:
    """Stop a resumed run that `EarlyStopping` has ended, as far as `trainer.min_epochs` and `min_steps` allow.

    Lightning restores the callback's counts, but not the stop itself, and would train until the next check.
    """
    trainer.should_stop = trainer.should_stop or _early_stop(trainer) is not None


def _early_stop(trainer: Trainer) -> EarlyStopping | None:
    """Return the callback that has ended the run, if there is one.

    Its `stopped_epoch` is 0 both for a run that goes on and for one that was ended in the first epoch. Its reason is
    known only to the process that saw one.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    stopping = [each for each in callbacks if isinstance(each, EarlyStopping)]
    kept = EarlyStoppingReason.NOT_STOPPED
    return next((each for each in stopping if each.stopped_epoch or each.stopping_reason != kept), None)


def warn_of_no_step(trainer: Trainer) -> None:
    """Warn that a resumed run was at its end before its first step."""
    if (stopping := _early_stop(trainer)) is not None:
        reason = (stopping.stopping_reason_message or "the reason was seen by another process").partition(" Signaling")
        rank_zero_warn(
            f"resume: found a checkpoint of step {trainer.global_step}, where EarlyStopping on {stopping.monitor} had "
            f"ended the run ({reason[0].rstrip('.')}). Nothing was trained. To go on, resume without this callback, or "
            "from an earlier checkpoint."
        )
        return
    rank_zero_warn(
        f"resume: found a checkpoint of step {trainer.global_step} (epoch {trainer.current_epoch}), where this run "
        f"ends: trainer.max_steps {trainer.max_steps}, max_epochs {trainer.max_epochs}, or max_time. Nothing was "
        "trained. Raise them to go on."
    )
