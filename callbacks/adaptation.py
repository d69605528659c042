"""Accuracy on an annotator's pairs, given a few of the annotator's labels, on validation and test data."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.collect import CollectPairs, log_round
from lpc_lightning.evaluation.adaptation.files import write_adaptation
from lpc_lightning.evaluation.adaptation.pairs import AdaptationPairs, AdaptationReport
from lpc_lightning.evaluation.adaptation.scores import SHOTS


class AnnotatorAdaptation(CollectPairs):
    """Callback that logs `adaptation/exact/N` and, if a posterior is learned, `adaptation/amortised/N`.

    Names start with val/ or test/. Each metric is the accuracy on an annotator's pairs, with codes inferred from N
    others of the same annotator: from prior times likelihood, or from the average of the learned posteriors (see
    `evaluation.adaptation.inference`). A policy without codes has nothing to infer: its `exact/N` is its accuracy over
    the same pairs.

    Further metrics: `adaptation/prior`, the policy under its prior, the same for all annotators;
    `adaptation/no_latent`, the same policy at z = 0, if it has a latent; and `adaptation/ceiling`, the best accuracy
    that is possible given the annotator, if the data gives it.

    The run folder gets `adaptation.json` with all scores, standard errors and counts, and `code_weights.json` with each
    annotator's weights over the codes, for `lpc-lightning generate --code-weights code_weights.json ANNOTATOR`. Both
    are of the last round, except for the sanity check.

    Args:
        column: Label that identifies a pair's annotator: `annotator`, `factor` or `source`. Pairs without this label
            are left out.
        shots: Numbers of labelled pairs. null: 0, 1, 2, 4, 8 and 16.
        rounds: Number of random choices of the labelled pairs, which are averaged.
        seed: Seed of the random choices.
    """

    def __init__(
        self, column: Group = "annotator", shots: list[int] | None = None, rounds: int = 20, seed: int = 0
    ) -> None:
        self.pairs = AdaptationPairs(column, SHOTS if shots is None else shots, rounds, seed)
        super().__init__(self.pairs)
        self.report = AdaptationReport()
        """Report of the last round."""

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round over all devices, and write the files."""
        self.report = self.pairs.collect()
        metrics = dict(self.report.metrics)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        by_annotator = self.pairs.column == "annotator"
        ceiling = data.ceiling if isinstance(data, PreferenceDataModule) and by_annotator else None
        if metrics and ceiling is not None:
            metrics["adaptation/ceiling"] = ceiling.given_annotator
        log_round(pl_module, stage, metrics)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call: all devices must make it
        if metrics and trainer.is_global_zero and not trainer.sanity_checking:
            write_adaptation(folder, self.report, self.pairs)
