"""Accuracy under the prior, the posterior, the exact marginal, no z and swapped z, on validation and test data."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.evaluation.accuracy.accuracy_modes import AccuracyModes, AccuracyReport, Group
from lpc_lightning.evaluation.accuracy.collect import CollectPairs, log_round


class PreferenceAccuracy(CollectPairs):
    """Callback that logs `accuracy/MODE`, `margin/MODE` and `log_loss/MODE` for each mode, and `swap_turnover`.

    Names start with val/ or test/. `accuracy/prior` is the module's own `rewards/accuracies`. All modes use the
    backbone pass of the step. Each mode needs a pass through the LM head; all codes together need one. Each metric is
    also logged by group, with the suffix `/source/NAME` or `/factor/NAME`; if labels were flipped, with `/clean` and
    `/flipped`; and for pairs of similar length, with `/length_matched`. `pairs/...` is the number of pairs in each
    group. Over all pairs there is also `calibration_error/MODE`, and, if labels were flipped, `wrong_label_auroc/MODE`.
    docs/accuracy_modes.md explains the metrics.

    If the data gives the best accuracy that is possible from the prompt (the built-in preferences), `share_of_best` is
    the main accuracy divided by it. It can be above 1 only by chance, in a finite sample.

    Args:
        by: Labels that define the groups: `source`, `factor`, `annotator`.
        most: Most groups of each label. Only the largest are kept; the others form the group `(others)`.
    """

    def __init__(self, by: list[Group] | None = None, most: int = 32) -> None:
        self.modes = AccuracyModes(["source", "factor"] if by is None else by, most)
        super().__init__(self.modes)
        self.report = AccuracyReport()
        """Report of the last round, with a row for each pair."""

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round over all devices."""
        self.report = self.modes.collect()
        metrics = dict(self.report.metrics)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        if isinstance(data, PreferenceDataModule) and data.ceiling is not None and metrics:
            metrics["share_of_best"] = metrics["accuracy/prior"] / data.ceiling.from_prompt
        log_round(pl_module, stage, metrics)
