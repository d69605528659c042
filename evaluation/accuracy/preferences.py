"""Preference accuracy of any policy on any preference data, after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.data import DataError, PreferenceDataModule
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.trainer_data import preference_data
from lpc_lightning.evaluation.accuracy.accuracy_modes import AccuracyModes, Group
from lpc_lightning.evaluation.accuracy.collect import Collector, CollectPairs
from lpc_lightning.evaluation.accuracy.mode_margins import LENGTH_SCALES
from lpc_lightning.evaluation.accuracy.pair_table import Row
from lpc_lightning.evaluation.benchmarks.context_latent import ContextLatent
from lpc_lightning.inference.opening import OpenedPolicy, open_module, open_policy
from lpc_lightning.latent import LatentTerms
from lpc_lightning.losses import simpo_loss
from lpc_lightning.seeding import run_seed, seeded_run
from lpc_lightning.types import PairLogps, PairLosses, PreferenceBatch

LIKELIHOOD = "mean token log-probability, no reference"
"""Description of the reward of a policy without an algorithm and a reference."""


@dataclass(frozen=True)
class PreferenceResults:
    """Scores of a policy on preference pairs."""

    metrics: dict[str, float]
    """`accuracy/MODE`, `log_loss/MODE`, `swap_turnover`, `pairs` and so on; see `AccuracyReport`. Also
    `accuracy/MODE/summed` and `accuracy/MODE/per_token`."""
    standard_errors: dict[str, float]
    """Standard errors of the means among the metrics."""
    items: list[Row]
    """One row per pair: its labels (see `pair_labels`), `margins` by mode, for paired comparisons, and `scaled`, the
    margins of rewards without and with length normalization, by `MODE/summed` and `MODE/per_token`."""
    reward: str
    """Description of the reward. Margins are differences of rewards."""
    pairs: int
    """Number of scored pairs."""
    dropped: dict[str, int]
    """Number of pairs that the length policy removed, by reason."""
    bad: dict[str, int]
    """Number of unusable rows, by reason."""
    cut: dict[str, int]
    """Number of scored pairs that the length policy shortened, by the shortened part."""


def preference_accuracy(
    model: PreferenceModule | OpenedPolicy | str,
    data: PreferenceDataModule,
    split: Literal["validation", "test"] = "test",
    by: Sequence[Group] = ("source", "factor"),
    precision: Any = None,
    progress_bar: bool = True,
    seed: int = 0,
) -> PreferenceResults:
    """Score preference pairs in every mode of the policy (see docs/accuracy_modes.md).

    A checkpoint is scored by the reward of its algorithm, against its reference. An exported folder or a plain model
    has no algorithm and no reference. Its reward is the mean log-probability of an answer's tokens, under the prior's z
    if it has a prior. Modes that need a posterior or the algorithm's loss are then absent.

    Args:
        model: A module (see `open_module`), a policy (see `open_policy`), or the path of either. Paths of checkpoints
            end in `.ckpt`.
        data: The pairs, in any form that the data module can read.
        split: The split to score.
        by: Labels by which pairs are grouped.
        precision: Precision of the computation, as in `trainer.precision`. None: the data type of the weights.
        progress_bar: Whether to show a progress bar.
        seed: See `evaluate_pairs`.

    Raises:
        DataError: There are no pairs in this split, or the data is invalid.
    """
    if isinstance(model, str):
        model = open_module(model) if Path(model).suffix == ".ckpt" else open_policy(model)
    module = LikelihoodScorer(model) if isinstance(model, OpenedPolicy) else model
    modes = AccuracyModes(by, scales=LENGTH_SCALES)
    rows = evaluate_pairs(module, data, modes, split, precision, progress_bar, seed)
    report = modes.collect()
    return PreferenceResults(
        metrics=report.metrics,
        standard_errors=report.standard_errors,
        items=report.items,
        reward=LIKELIHOOD if isinstance(module, LikelihoodScorer) else f"implicit reward of {type(module).__name__}",
        pairs=len(report.items),
        dropped=rows.dropped,
        bad=rows.bad,
        cut=rows.cut,
    )


def evaluate_pairs(
    module: PreferenceModule | LikelihoodScorer,
    data: PreferenceDataModule,
    collector: Collector,
    split: Literal["validation", "test"] = "test",
    precision: Any = None,
    progress_bar: bool = True,
    seed: int = 0,
) -> DataReport:
    """Evaluate each pair once, on the module's device, and add every batch to a collector.

    Args:
        module: The module, with its models built.
        data: The pairs.
        collector: The collector.
        split: The split to evaluate.
        precision: Precision of the computation, as in `trainer.precision`. None: the data type of the weights.
        progress_bar: Whether to show a progress bar.
        seed: Seed of the draws, if z is sampled. An algorithm draws for each batch, and a policy without an algorithm
            for each prompt.

    Returns:
        Counts of the used, removed and shortened rows of the data.

    Raises:
        DataError: There are no pairs in this split, or the data is invalid.
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
    data.set_tokenizer(module.tokenizer)
    run = trainer.test if split == "test" else trainer.validate
    with seeded_run(seed):
        run(module, datamodule=data, verbose=False)
    module.to(device)  # the trainer leaves the module on the CPU
    rows = data.reports.get(split)
    if rows is None or not len(data.pairs[split]):
        raise DataError(f"preferences: found no {split} pairs, expected at least one.{f' {rows}' if rows else ''}")
    return rows


class LikelihoodScorer(LightningModule):
    """A policy whose reward is the mean log-probability per token of an answer: SimPO's reward at beta = 1."""

    latent = None
    """There is no latent space, and thus no posterior and no loss per code."""

    def __init__(self, opened: OpenedPolicy) -> None:
        """Wrap a policy without changing it.

        Args:
            opened: An exported folder or a plain model.
        """
        super().__init__()
        self.policy, self.prior = opened.policy, opened.prior
        self.tokenizer: PreTrainedTokenizerBase = opened.tokenizer

    def setup(self, stage: str) -> None:
        """Give the policy to the DataModule, which has read the pairs, as `PreferenceModule` does."""
        if (data := preference_data(self.trainer)) is not None:
            data.set_policy(self.policy)

    def test_step(self, batch: PreferenceBatch, batch_idx: int) -> EvaluationOutput:
        """Score the pairs under the prior's z, or without z if there is no prior."""
        forward = self.policy(batch)
        score = BatchScorer(forward, batch.lengths, None, mean_logps)
        z = None
        if self.prior is not None:
            latent = ContextLatent(self.prior, None, run_seed())
            z = latent(forward.states.prompt, [[prompt] for prompt in batch.prompts])
        return {"terms": LatentTerms(*score.under(z), z=z), "states": forward.states, "score": score}

    validation_step = test_step


def mean_logps(logps: PairLogps) -> PairLosses:
    """Return rewards that are the answers' mean log-probabilities per token, in nats."""
    return simpo_loss(logps, beta=1.0, gamma_beta_ratio=0.0)
