"""Callbacks of Lightning that do not work with a module whose models are built after the setup of the callbacks."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging

from lpc_lightning.errors import ConfigError

REASONS: dict[type[Callback], str] = {
    BatchSizeFinder: (
        "which tries batch sizes in turn from one checkpoint, expected none, because a checkpoint has the batch size "
        "of its run. Set data.batch_size and trainer.accumulate_grad_batches."
    ),
    LearningRateFinder: (
        "which needs a module with a single learning rate, expected none. Set model.optimizer.lr and model.latent_lr, "
        "or choose them with `tune` of a grid (lpc-lightning ablate)."
    ),
    StochasticWeightAveraging: (
        "which copies the module before its weights exist, so that it averages none, expected another callback: "
        "EMAWeightAveraging or WeightAveraging of lightning.pytorch.callbacks."
    ),
}
"""Why a callback is refused, and what to do."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that would fail later or do nothing.

    Raises:
        ConfigError: One of the callbacks is refused.
    """
    for callback in callbacks:
        for refused, reason in REASONS.items():
            if isinstance(callback, refused):
                raise ConfigError(f"callbacks: found {type(callback).__name__}, {reason}")
