"""Accuracy under the prior, the posterior, the exact marginal, no z and others' z, on validation and test data."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from evaluation.accuracy_modes import AccuracyModes, AccuracyReport, Group
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.modules.scoring import Evaluated
from lpc_lightning.types import PreferenceBatch


class PreferenceAccuracy(Callback):
    """Logs `accuracy/MODE` and `margin/MODE` for each mode of `mode_margins`, and `swap_turnover`, under val/ or test/.

    `accuracy/prior` is the module's own `rewards/accuracies`. The modes take the step's backbone pass over: each costs
    a pass through the LM head, all codes together cost one. Each number stands behind `/source/NAME` and
    `/factor/NAME` again, and, where labels were flipped, behind `/clean` and `/flipped`; `pairs/...` says how many
    pairs it rests on. docs/accuracy_modes.md tells how to read them.

    Of data that knows the best accuracy that the prompt allows (the built-in preferences), `share_of_best` is the
    headline as a share of it: above 1 only by the luck of a finite sample.

    Args:
        by: Labels by whose values pairs are told apart: `source`, `factor`, `annotator`.
        most: Groups of each kind that are told apart, the largest ones; the others are taken together as `(others)`.
    """

    def __init__(self, by: list[Group] | None = None, most: int = 32) -> None:
        self.modes = AccuracyModes(["source", "factor"] if by is None else by, most)
        self.report = AccuracyReport()
        """Of the last round, with a row for each pair."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no pairs."""
        self._start(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with no pairs."""
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch under every mode."""
        self._update(trainer, pl_module, outputs, batch)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PreferenceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch under every mode."""
        self._update(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round, over all devices."""
        self._log("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round, over all devices."""
        self._log("test", trainer, pl_module)

    def _start(self, pl_module: LightningModule) -> None:
        self.modes.reset()
        self.modes.to(pl_module.device)

    def _update(self, trainer: Trainer, pl_module: LightningModule, outputs: Evaluated, batch: PreferenceBatch) -> None:
        with trainer.precision_plugin.forward_context():  # the step's own has been left
            self.modes.update(outputs, batch, pl_module.latent)  # type: ignore[arg-type]  # of a `PreferenceModule`

    def _log(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = self.modes.collect()
        found = dict(self.report.metrics)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        if isinstance(data, PreferenceDataModule) and data.ceiling is not None and found:
            found["share_of_best"] = found["accuracy/prior"] / data.ceiling.from_prompt
        # Tensors: Lightning would round numbers to float32, and the headline would not be the module's to the last bit.
        metrics = {f"{stage}/{name}": torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
        # All devices hold the same values by now; sync_dist only keeps Lightning from warning that they might not.
        pl_module.log_dict(metrics, batch_size=1, sync_dist=True)
