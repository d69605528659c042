"""Accuracy under the prior, the posterior, the exact marginal, no z and swapped z, on validation and test data."""

from __future__ import annotations

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.averaged_weights import validated_weights
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.trainer_data import preference_data
from lpc_lightning.evaluation.accuracy.accuracy_modes import MOST_GROUPS, AccuracyModes, AccuracyReport, Group
from lpc_lightning.evaluation.accuracy.collect import CollectPairs, log_round, score_batches
from lpc_lightning.seeding import derive, run_seed

TRAINING_METRICS = ("wrong_label_auroc/", "gold_accuracy/")
"""Prefixes of the metrics of training pairs that are logged."""


class PreferenceAccuracy(CollectPairs):
    """Callback that logs `accuracy/MODE`, `margin/MODE` and `log_loss/MODE` for each mode, and `swap_turnover`.

    Names start with val/ or test/. `accuracy/prior` is the module's own `rewards/accuracies`. All modes use the
    backbone pass of the step. Each mode needs a pass through the LM head; all codes together need one. Each metric is
    also logged by group, with the suffix `/source/NAME` or `/factor/NAME`; if labels are wrong, with `/clean` and
    `/flipped`; and for pairs of similar length, with `/length_matched`. `pairs/...` is the number of pairs in each
    group. Over all pairs there is also `calibration_error/MODE`. If pairs have gold labels, there are also
    `gold_accuracy/MODE` and its like against the right labels, and if some labels are wrong `wrong_label_auroc/MODE`.
    docs/accuracy_modes.md explains the metrics.

    If training pairs have gold labels, or label noise has flipped some, each validation of a fit also scores
    `training_pairs` training pairs with their labels. It logs `val/training/gold_accuracy/MODE`, and if some of these
    labels are wrong `val/training/wrong_label_auroc/MODE`, which shows whether the policy finds them. The cost is one
    forward pass over these pairs for each validation.

    If the data gives the best accuracy that is possible from the prompt (the built-in preferences), `share_of_best` is
    the main accuracy divided by it. It can be above 1 only by chance, in a finite sample.

    Args:
        by: Labels that define the groups: `source`, `factor`, `annotator`.
        most: Most groups of each label. Only the largest are kept; the others form the group `(others)`.
        training_pairs: Maximum number of training pairs that a validation scores if their right labels are known.
            0: none.
    """

    def __init__(self, by: list[Group] | None = None, most: int = MOST_GROUPS, training_pairs: int = 512) -> None:
        self.modes = AccuracyModes(["source", "factor"] if by is None else by, most)
        super().__init__(self.modes)
        self.training_pairs = training_pairs
        self.report = AccuracyReport()
        """Report of the last round, with a row for each pair."""
        self.training_report = AccuracyReport()
        """Report of the last round on training pairs. Empty if the right training labels are unknown."""
        self._sample: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the training pairs to score, the same in all runs with this seed."""
        data = preference_data(trainer)
        self._sample = []
        if data is None or not self.training_pairs:
            return
        order = np.random.default_rng(derive("training sample", run_seed())).permutation(sorted(data.reads("train")))
        sample = order[: max(self.training_pairs, trainer.world_size)].tolist()
        pairs = data.training_pairs
        if (pairs.flipped | pairs.has_gold)[sample].any() and len(sample) >= trainer.world_size:
            self._sample = sample

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round over all devices."""
        self.report = self.modes.collect()
        metrics = dict(self.report.metrics)
        data = preference_data(trainer)
        if data is not None and data.ceiling is not None and metrics:
            metrics["share_of_best"] = metrics["accuracy/prior"] / data.ceiling.from_prompt
        in_training = trainer.state.fn == TrainerFn.FITTING and stage == "val" and not trainer.sanity_checking
        if data is not None and in_training and self._sample and isinstance(pl_module, PreferenceModule):
            self.training_report = self._score_training(trainer, pl_module, data)
            for name, value in self.training_report.metrics.items():
                if name.startswith(TRAINING_METRICS) and name.count("/") == 1:
                    metrics[f"training/{name}"] = value
        log_round(pl_module, stage, metrics)

    def _score_training(self, trainer: Trainer, module: PreferenceModule, data: PreferenceDataModule) -> AccuracyReport:
        modes = AccuracyModes((), 0).to(module.device)
        with validated_weights(trainer, module, at_epoch_end=self):
            score_batches(trainer, module, data.training_sample(self._sample), modes)
        return modes.collect()
