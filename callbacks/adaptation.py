"""Accuracy on an annotator's pairs, given a few of the annotator's labels, on validation and test data."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.data.trainer_data import preference_data
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.collect import CollectPairs, log_round, score_batches
from lpc_lightning.evaluation.adaptation.files import write_adaptation
from lpc_lightning.evaluation.adaptation.pairs import NO_MAJORITY, AdaptationPairs, AdaptationReport
from lpc_lightning.evaluation.adaptation.policy import PolicyUnderMixtures
from lpc_lightning.evaluation.adaptation.scores import SHOTS, Score
from lpc_lightning.loggers import run_folder
from lpc_lightning.seeding import derive


class AnnotatorAdaptation(CollectPairs):
    """Callback that logs `adaptation/exact/N` and, if a posterior is learned, `adaptation/amortized/N`.

    Names start with val/ or test/. Each metric is the accuracy on an annotator's pairs, with codes inferred from N
    others of the same annotator: from prior times likelihood, or from the average of the learned posteriors (see
    `evaluation.adaptation.inference`). A policy without codes has nothing to infer: its `exact/N` is its accuracy over
    the same pairs.

    `adaptation/adapted/N` is one of these that every policy has, for tuning: `exact/N`, or `amortized_z/N` of a
    Gaussian latent.

    If all pairs have the same two answers, such as "I agree." and "I disagree.", two baselines use labels alone:
    `adaptation/own_majority/N`, the majority of the N labels, and `adaptation/others_majority`, the majority of the
    other annotators' labels of the same prompt. A tie is half right.

    `adaptation/share_of_pairs/N` is the share of the evaluated pairs behind these numbers. It is below 1 if annotators
    have fewer than N labelled pairs. Compare two N with the same share: others are of different annotators.

    Further metrics: `adaptation/prior`, the policy under its prior, the same for all annotators;
    `adaptation/no_latent`, the same policy at z = 0, if it has a latent; and `adaptation/ceiling`, the best accuracy
    that is possible given the annotator, if the data gives it.

    The run folder gets `adaptation.json` with all scores, standard errors and counts, and `code_weights.json` with each
    annotator's weights over the codes, for `lpc-lightning generate --code_weights code_weights.json ANNOTATOR`. Both
    are of the last round, except for the sanity check.

    Args:
        column: Label that identifies a pair's annotator: `annotator`, `factor` or `source`. Pairs without this label
            are left out.
        shots: Numbers of labelled pairs. null: 0, 1, 2, 4, 8 and 16.
        rounds: Number of random choices of the labelled pairs, which are averaged.
        seed: Seed of the random choices.
        training_pairs: Maximum number of training pairs of each annotator from which the labelled pairs are drawn. They
            are pairs that the fit reads, so that only a process that has fitted has them, as `ablate` does. If the
            policy has a latent, they are scored once for each validation or test after the fit. Validations during the
            fit log nothing of this callback. 0: the labelled pairs are other evaluated pairs.
        under_z: Also score the policy under z = sum_k w_k e_k, with weights w of the first round:
            `adaptation/exact_z/N`, and `adaptation/amortized_z/N` if a posterior is learned. This is the only
            adaptation of a Gaussian latent, whose w is the mean of the posterior's means. It takes a second pass over
            the pairs, and is left out in validations during a fit.
    """

    def __init__(
        self,
        column: Group = "annotator",
        shots: list[int] | None = None,
        rounds: int = 20,
        seed: int = 0,
        training_pairs: int = 0,
        under_z: bool = False,
    ) -> None:
        if training_pairs < 0:
            raise ConfigError(f"AnnotatorAdaptation.training_pairs: found {training_pairs}, expected at least 0.")
        self.pairs = AdaptationPairs(column, SHOTS if shots is None else shots, rounds, seed)
        super().__init__(self.pairs)
        self.training_pairs, self.under_z = training_pairs, under_z
        self.report = AdaptationReport()
        """Report of the last round."""

    def finish(self, stage: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the round over all devices, and write the files."""
        scorer = pl_module if isinstance(pl_module, PreferenceModule) else None  # another module scores no other pairs
        if trainer.state.fn == TrainerFn.FITTING:
            scorer = None
        if self.training_pairs:
            if scorer is None:
                return
            self._score_labelled(trainer, scorer)
        self.report = self.pairs.collect()
        if self.under_z and scorer is not None and self.report.mixtures:
            self.report = replace(
                self.report, scores={**self.report.scores, **self._scores_under_z(stage, trainer, scorer)}
            )
        if self.report.annotators and not self.report.has_majority:
            rank_zero_info(f"adaptation, {stage}: {NO_MAJORITY}")
        metrics = {name: score.accuracy for name, score in self.report.metrics.items()} | self.report.shares_of_pairs
        data = preference_data(trainer)
        ceiling = data.ceiling if data is not None and self.pairs.column == "annotator" else None
        if metrics and ceiling is not None:
            metrics["adaptation/ceiling"] = ceiling.given_annotator
        log_round(pl_module, stage, metrics)
        folder = run_folder(trainer)
        if metrics and trainer.is_global_zero and not trainer.sanity_checking:
            write_adaptation(folder, self.report, self.pairs)

    def _score_labelled(self, trainer: Trainer, module: PreferenceModule) -> None:
        data = preference_data(trainer)
        labelled = self._choose_labelled(data) if data is not None and "train" in data.pairs else []
        if data is None or len(labelled) < trainer.world_size:
            raise ConfigError(
                f"AnnotatorAdaptation.training_pairs: found {self.training_pairs} in a run without labelled training "
                f"pairs (column {self.pairs.column}), expected a fit in the same process on pairs with this label, as "
                "ablate runs it. Set 0, or use `lpc-lightning adapt --labelled_split train`."
            )
        sample = data.training_sample(labelled)
        if module.latent is None:
            for batch in sample:
                self.pairs.labelled.add_labels(batch)
        else:
            score_batches(trainer, module, sample, self.pairs.labelled)

    def _choose_labelled(self, data: PreferenceDataModule) -> list[int]:
        """Choose the labelled pairs of each annotator, the same in all runs that read the same pairs."""
        pairs = data.training_pairs
        # A mixture may repeat pairs, which count once, and its data sets may have the same ids.
        members: dict[str, dict[tuple[str, str], int]] = {}
        for index in sorted(data.reads("train")):
            pair = pairs[index]
            if name := str(getattr(pair, self.pairs.column)):
                members.setdefault(name, {}).setdefault((pair.id, pair.content), index)
        chosen: list[int] = []
        for own in members.values():
            order = sorted(own, key=lambda key: derive("labelled", self.pairs.seed, key[0]))
            chosen += [own[key] for key in order[: self.training_pairs]]
        return chosen

    def _scores_under_z(self, stage: str, trainer: Trainer, module: PreferenceModule) -> dict[str, dict[int, Score]]:
        policy = PolicyUnderMixtures(self.report.mixtures, self.pairs.column).to(module.device)
        in_test = stage == "test"
        loader: Any = trainer.test_dataloaders if in_test else trainer.val_dataloaders
        (batches,) = trainer.num_test_batches if in_test else trainer.num_val_batches
        score_batches(trainer, module, islice(loader, int(batches)), policy)
        return policy.scores()
