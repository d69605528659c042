"""Preference accuracy of any policy on any preference data, after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.scoring import BatchScorer, Evaluated
from lpc_lightning.data import DataError, PreferenceDataModule
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.evaluation.accuracy.accuracy_modes import AccuracyModes, Group
from lpc_lightning.evaluation.accuracy.collect import Collector, CollectPairs
from lpc_lightning.evaluation.accuracy.pair_table import Row
from lpc_lightning.inference.opening import OpenedPolicy, open_module, open_policy
from lpc_lightning.latent import LatentTerms
from lpc_lightning.losses import simpo_loss
from lpc_lightning.types import PairLogps, PairLosses, PreferenceBatch

LIKELIHOOD = "mean token log-probability, no reference"


@dataclass(frozen=True)
class PreferenceResults:
    """What a policy says of preference pairs."""

    metrics: dict[str, float]
    """`accuracy/MODE`, `margin/MODE`, `swap_turnover`, `pairs`; see `AccuracyReport`."""
    standard_errors: dict[str, float]
    """Of the means among the metrics."""
    items: list[Row]
    """One a pair: id, source, factor, annotator, flipped, and `margins` by mode, for paired comparisons."""
    reward: str
    """What the margins are differences of."""
    pairs: int
    """How many were scored."""
    dropped: dict[str, int]
    """Pairs that the length policy left out, by reason."""
    bad: dict[str, int]
    """Rows that could not be used, by reason."""
    cut: dict[str, int]
    """Scored pairs that the length policy shortened, by what was cut."""


def preference_accuracy(
    model: PreferenceModule | OpenedPolicy | str,
    data: PreferenceDataModule,
    split: Literal["validation", "test"] = "test",
    by: Sequence[Group] = ("source", "factor"),
    precision: Any = None,
    progress_bar: bool = True,
) -> PreferenceResults:
    """Score the pairs under every mode that the policy has (see docs/accuracy_modes.md).

    A checkpoint answers by its algorithm's reward, against its reference. An exported folder or a plain model knows
    neither: its reward is the mean log-probability of an answer's tokens, under the prior's z where it has a prior, and
    of the modes that need a posterior or the algorithm's loss there are none.

    Args:
        model: A module (`open_module`), a policy (`open_policy`), or the path of either; paths of checkpoints end in
            `.ckpt`.
        data: The pairs, in any form that the data module reads.
        split: Which of its pairs.
        by: Labels by whose values pairs are told apart as well.
        precision: Of the computation, as `trainer.precision`; None computes in the weights' own type.
        progress_bar: Show one.

    Raises:
        DataError: There are no such pairs, or there is something wrong with them.
    """
    if isinstance(model, str):
        model = open_module(model) if model.endswith(".ckpt") else open_policy(model)
    module = Likelihood(model) if isinstance(model, OpenedPolicy) else model
    modes = AccuracyModes(by)
    rows = pass_over(module, data, modes, split, precision, progress_bar)
    report = modes.collect()
    return PreferenceResults(
        metrics=report.metrics,
        standard_errors=report.standard_errors,
        items=report.items,
        reward=LIKELIHOOD if isinstance(module, Likelihood) else f"implicit reward of {type(module).__name__}",
        pairs=len(report.items),
        dropped=rows.dropped,
        bad=rows.bad,
        cut=rows.cut,
    )


def pass_over(
    module: PreferenceModule | Likelihood,
    data: PreferenceDataModule,
    collector: Collector,
    split: Literal["validation", "test"] = "test",
    precision: Any = None,
    progress_bar: bool = True,
) -> DataReport:
    """Evaluate each pair once, on the device that the module is on, and have a collector take in every batch.

    Args:
        module: Built.
        data: The pairs.
        collector: Takes them in.
        split: Which of the pairs.
        precision: Of the computation, as `trainer.precision`; None computes in the weights' own type.
        progress_bar: Show one.

    Returns:
        What became of the data's rows.

    Raises:
        DataError: There are no such pairs, or there is something wrong with them.
    """
    device = next(module.parameters()).device
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=precision,
        callbacks=[CollectPairs(collector)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress_bar,
    )
    run = trainer.test if split == "test" else trainer.validate
    with isolate_rng():
        run(module, datamodule=data, verbose=False)
    module.to(device)  # the trainer has left it on the CPU
    rows = data.reports.get(split)
    if rows is None or not len(data.pairs[split]):
        raise DataError(f"preferences: found no {split} pairs, expected at least one.{f' {rows}' if rows else ''}")
    return rows


class Likelihood(LightningModule):
    """A policy that scores answers by their mean log-probability per token: SimPO's reward at beta = 1."""

    latent = None
    """No space that knows a posterior or the loss under each code."""

    def __init__(self, opened: OpenedPolicy) -> None:
        """Take the policy as it is.

        Args:
            opened: An exported folder or a plain model.
        """
        super().__init__()
        self.policy, self.prior = opened.policy, opened.prior
        self.tokenizer: PreTrainedTokenizerBase = opened.tokenizer

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> Evaluated:
        """Score the pairs under the prior's z, or without one."""
        reading = self.policy.read(batch)
        score = BatchScorer(reading, batch.lengths, None, mean_logps)
        z = None if self.prior is None else self.prior(reading.states.prompt)
        return {"terms": LatentTerms(*score.under(z), z=z), "states": reading.states, "score": score}

    validation_step = test_step


def mean_logps(logps: PairLogps) -> PairLosses:
    """Each answer's mean log-probability per token as its reward, in nats."""
    return simpo_loss(logps, beta=1.0, gamma_beta_ratio=0.0)
