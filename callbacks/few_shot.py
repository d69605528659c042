"""How well an annotator's labels follow from a few of them, on validation and test data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from evaluation.accuracy_modes import Group
from evaluation.few_shot_files import write_few_shot
from evaluation.few_shot_pairs import FewShotPairs, FewShotReport
from evaluation.few_shot_scores import SHOTS
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.modules.scoring import Evaluated
from lpc_lightning.types import PreferenceBatch


class FewShotAnnotators(Callback):
    """Logs `few_shot/exact/N` and, where a posterior is learned, `few_shot/amortised/N`, under val/ or test/.

    Each is the accuracy on an annotator's pairs when the codes are inferred from N others of the same annotator: by
    prior times evidence, or by the average of the learned posteriors (see `evaluation.few_shot`). A policy without
    codes has nothing to infer: its `exact/N` is the policy as it is, over the same pairs, and what there is to beat.

    Beside them `few_shot/prior`, the policy as it is used for anybody; `few_shot/no_latent`, the same policy at z = 0,
    where it has a latent; and `few_shot/ceiling`, the best there is given the annotator, where the data knows it.

    The run folder gets `few_shot.json` with all of it, standard errors and counts, and `code_weights.json` with each
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
        self.pairs = FewShotPairs(column, SHOTS if shots is None else shots, rounds, seed)
        self.report = FewShotReport()
        """Of the last round."""

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
        """Keep what the batch's pairs say under every code."""
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
        """Keep what the batch's pairs say under every code."""
        self._update(trainer, pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round, over all devices."""
        self._finish("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round, over all devices."""
        self._finish("test", trainer, pl_module)

    def _start(self, pl_module: LightningModule) -> None:
        self.pairs.reset()
        self.pairs.to(pl_module.device)

    def _update(self, trainer: Trainer, pl_module: LightningModule, outputs: Evaluated, batch: PreferenceBatch) -> None:
        with trainer.precision_plugin.forward_context():  # the step's own has been left
            self.pairs.update(outputs, batch, pl_module.latent)  # type: ignore[arg-type]  # of a `PreferenceModule`

    def _finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = self.pairs.collect()
        found = dict(self.report.metrics)
        data = trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning's connector
        known = data.ceiling if isinstance(data, PreferenceDataModule) and self.pairs.column == "annotator" else None
        if found and known is not None:
            found["few_shot/ceiling"] = known.given_annotator
        metrics = {f"{stage}/{name}": torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
        # All devices hold the same values by now; sync_dist only keeps Lightning from warning that they might not.
        pl_module.log_dict(metrics, batch_size=1, sync_dist=True)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks all devices
        if found and trainer.is_global_zero and not trainer.sanity_checking:
            write_few_shot(folder, self.report, self.pairs)
