"""Callbacks that add every evaluated batch to a collector of pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PreferenceBatch


class Collector(Protocol):
    """Interface of a collector of evaluated batches, such as `AccuracyModes` or `AdaptationPairs`."""

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch. It is called under the precision of the step."""
        ...

    def reset(self) -> None:
        """Remove all pairs."""
        ...

    def to(self, device: torch.device) -> Any:
        """Move to the device of the batches."""
        ...


class CollectValidation(Callback):
    """Base of callbacks that add every validation batch to a collector. Subclasses implement `finish`."""

    collector: Collector | None
    """The collector. It is emptied at the start of each round. None turns the callback off."""

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle the end of a round. `stage` is `val` or `test`."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Empty the collector."""
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
        """Add the batch to the collector."""
        if self.collector is not None:
            with trainer.precision_plugin.forward_context():  # the precision context of the step has ended
                self.collector.update(outputs, batch, pl_module.latent)  # type: ignore[arg-type]  # a space, or None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call `finish`."""
        if self.collector is not None:
            self.finish("val", trainer, pl_module)


class CollectPairs(CollectValidation):
    """A callback that adds every validation and test batch to a collector."""

    def __init__(self, collector: Collector) -> None:
        """Store the collector."""
        self.collector = collector

    on_test_epoch_start = CollectValidation.on_validation_epoch_start
    on_test_batch_end = CollectValidation.on_validation_batch_end

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call `finish`."""
        self.finish("test", trainer, pl_module)


def score_batches(
    trainer: Trainer, module: PreferenceModule, batches: Iterable[PreferenceBatch], collector: Collector
) -> None:
    """Score batches within a run, and add them to a collector. For callbacks that score other pairs."""
    for number, batch in enumerate(batches):
        with trainer.precision_plugin.forward_context():
            collector.update(module.scoring_step(batch.to(module.device), number), batch, module.latent)


def log_round(pl_module: LightningModule, stage: str, values: Mapping[str, float]) -> None:
    """Log numbers that are the same on all devices, with the prefix `stage`, in float64.

    Lightning would round plain numbers to float32. The logged accuracy would then differ from the module's.
    """
    # One transfer to the module's device, where Lightning averages the values over processes.
    on_device = torch.tensor(list(values.values()), dtype=torch.float64).to(pl_module.device).unbind()
    metrics = {f"{stage}/{name}": value for name, value in zip(values, on_device, strict=True)}
    # sync_dist=True only suppresses Lightning's warning about possibly different values per device.
    pl_module.log_dict(metrics, batch_size=1, sync_dist=True)
