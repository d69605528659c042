"""How a run is cut into steps and when it ends, held against the run that it goes on with."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_warn

from lpc_lightning.errors import ConfigError

LENGTH = ("max_epochs", "max_steps", "limit_train_batches")
"""The trainer's settings that say when training ends."""


def run_length(trainer: Trainer) -> dict[str, Any]:
    """The trainer's settings as a checkpoint keeps them, by name."""
    accumulated: Any = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning's connector
        if isinstance(callback, GradientAccumulationScheduler):
            accumulated = callback.scheduling  # by epoch; the trainer's own number is the current epoch's
    return {"accumulate_grad_batches": accumulated, **{name: getattr(trainer, name) for name in LENGTH}}


def compare_run_length(trainer: Trainer, before: dict[str, Any]) -> None:
    """Refuse to go on in steps of another size; warn where the run ends elsewhere, which may well be what is wanted.

    Args:
        trainer: The trainer of the resumed run.
        before: `run_length` of the run that wrote the checkpoint.

    Raises:
        ConfigError: Another `accumulate_grad_batches`.
    """
    now = run_length(trainer)
    name = "accumulate_grad_batches"
    if now[name] != before[name]:
        raise ConfigError(
            f"trainer.{name}: found {now[name]}, expected {before[name]} as in the checkpoint. Resume with the same, "
            "or start anew from the weights."
        )
    if changes := [f"{name} {now[name]} (before: {before[name]})" for name in LENGTH if now[name] != before[name]]:
        rank_zero_warn(
            f"resume: found trainer.{', trainer.'.join(changes)}: from here on, the schedules of the learning rate, g "
            f"and tau are those of a run of {trainer.estimated_stepping_batches} steps."
        )
