"""A callback that hands every evaluated batch to what collects pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms.scoring import Evaluated
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PreferenceBatch


class Collector(Protocol):
    """What takes in evaluated batches: `AccuracyModes`, `AdaptationPairs`."""

    def update(self, evaluated: Evaluated, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Take in a batch, in the precision of the step."""
        ...

    def reset(self) -> None:
        """Forget all pairs."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move to where the batches are."""
        ...


class CollectValidation(Callback):
    """Has a collector take in every batch of validation; a subclass says what a round comes to."""

    collector: Collector | None
    """Starts each round with no pairs. None: idle."""

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """The round is over; `stage` is `val` or `test`."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no pairs."""
        if self.collector is not None:
            self.collector.reset()
            self.collector.to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in the batch."""
        if self.collector is not None:
            with trainer.precision_plugin.forward_context():  # the step's own has been left
                self.collector.update(outputs, batch, pl_module.latent)  # type: ignore[arg-type]  # a space, or None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `finish`."""
        if self.collector is not None:
            self.finish("val", trainer, pl_module)


class CollectPairs(CollectValidation):
    """The same in validation and in test."""

    def __init__(self, collector: Collector) -> None:
        """Keep the collector."""
        self.collector = collector

    on_test_epoch_start = CollectValidation.on_validation_epoch_start
    on_test_batch_end = CollectValidation.on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `finish`."""
        self.finish("test", trainer, pl_module)


def log_round(pl_module: LightningModule, stage: str, found: Mapping[str, float]) -> None:
    """Log numbers that all devices hold alike, behind `stage`, in float64.

    Lightning would round plain numbers to float32, and the headline would not be the module's to the last bit.
    """
    # On the module's device, over whose connection Lightning takes the mean; in one transfer.
    values = torch.tensor(list(found.values()), dtype=torch.float64).to(pl_module.device).unbind()
    metrics = {f"{stage}/{name}": value for name, value in zip(found, values, strict=True)}
    # sync_dist only keeps Lightning from warning that devices might hold different values.
    pl_module.log_dict(metrics, batch_size=1, sync_dist=True)
