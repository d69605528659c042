"""Averages of the weights that Lightning's `WeightAveraging` keeps, for what a callback reads outside a validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


@contextmanager
def validated_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Give the module the weights that a validation would score, and the trained weights back after the block.

    Without a callback that averages the weights, these are the same.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    averages = [each for each in callbacks if isinstance(each, WeightAveraging)]
    for each in averages:
        each.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for each in averages:
            each.on_validation_epoch_end(trainer, module)
