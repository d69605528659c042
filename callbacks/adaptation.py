"""How well an annotator's labels follow from a few of them, on validation and test data."""

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
    """Logs `adaptation/exact/N` and, where a posterior is learned, `adaptation/amortised/N`, under val/ or test/.

    Each is the accuracy on an annotator's pairs when the codes are inferred from N others of the same annotator: by
    prior times evidence, or by the average of the learned posteriors (see `evaluation.adaptation.inference`). A policy
    without codes has nothing to infer: its `exact/N` is the policy as it is, over the same pairs.

    Beside them `adaptation/prior`, the policy as it is used for anybody; `adaptation/no_latent`, the same policy at z
    = 0,
    where it has a latent; and `adaptation/ceiling`, the best there is given the annotator, where the data knows it.

    The run folder gets `adaptation.json` with all of it, standard errors and counts, and `code_weights.json` with each
    annotator's weights over the codes, for `lpc-lightning generate --code-weights code_weights.json ANNOTATOR`; both of
    the last round, the sanity check left out.

    Args:
        column: The label that says whose pair it is: `annotator`, `factor` or `source`. Pairs without one are left out.
        shots: Labelled pairs to give. null: 0, 1, 2, 4, 8 and 16.
        rounds: Random choices of the pairs that are given, to average over.
        seed: Of these.
    """

    def __init__(
        self, column: Group = "annotator", shots: list[int] | None = None, rounds: int = 20, seed: int = 0
    ) -> None:
        self.pairs = AdaptationPairs(column, SHOTS if shots is None else shots, rounds, seed)
        super().__init__(self.pairs)
        self.report = AdaptationReport()
        """Of the last round."""

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round, over all devices."""
        self.report = self.pairs.collect()
        found = dict(self.report.metrics)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        known = data.ceiling if isinstance(data, PreferenceDataModule) and self.pairs.column == "annotator" else None
        if found and known is not None:
            found["adaptation/ceiling"] = known.given_annotator
        log_round(pl_module, stage, found)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all devices
        if found and trainer.is_global_zero and not trainer.sanity_checking:
            write_adaptation(folder, self.report, self.pairs)
