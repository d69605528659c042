"""Accuracy under the prior, the posterior, the exact marginal, no z and others' z, on validation and test data."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.evaluation.accuracy.accuracy_modes import AccuracyModes, AccuracyReport, Group
from lpc_lightning.evaluation.accuracy.collect import CollectPairs, log_round


class PreferenceAccuracy(CollectPairs):
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
        super().__init__(self.modes)
        self.report = AccuracyReport()
        """Of the last round, with a row for each pair."""

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round, over all devices."""
        self.report = self.modes.collect()
        found = dict(self.report.metrics)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        if isinstance(data, PreferenceDataModule) and data.ceiling is not None and found:
            found["share_of_best"] = found["accuracy/prior"] / data.ceiling.from_prompt
        log_round(pl_module, stage, found)
