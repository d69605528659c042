"""Averages of the weights that `WeightAveraging` of Lightning keeps, for what a callback reads after the batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


@contextmanager
def validated_weights(
    trainer: Trainer, module: LightningModule, at_epoch_end: Callback | None = None
) -> Iterator[None]:
    """Give the module the weights that a validation scores, and its own weights back after the block.

    Without a callback that averages the weights, these are the same.

    Args:
        trainer: The trainer with its callbacks.
        module: The module that is trained.
        at_epoch_end: The callback whose `on_validation_epoch_end` is running. Callbacks after it in the list have not
            taken their average back yet. None: no validation is running.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    earlier = takewhile(lambda each: each is not at_epoch_end, callbacks)
    averages = [each for each in earlier if isinstance(each, WeightAveraging)]
    for each in averages:
        each.on_validation_epoch_start(trainer, module)
    try:
        yield
    finally:
        for each in averages:
            each.on_validation_epoch_end(trainer, module)
