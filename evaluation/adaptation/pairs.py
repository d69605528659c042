"""Collect from evaluated batches what the adaptation to annotators needs of each pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lpc_lightning.algorithms.latent_mixin import EvaluationOutput
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, join_codes, pair_labels, split_codes
from lpc_lightning.evaluation.adaptation.inference import CodeTables, code_weights, correct, single_code
from lpc_lightning.evaluation.adaptation.scores import (
    SHOTS,
    PairKey,
    Score,
    adaptation_mixtures,
    adaptation_scores,
    check_shots,
    mean_score,
)
from lpc_lightning.latent import DiscreteSpace, LatentSpace
from lpc_lightning.latent.estimators import PosteriorSpace
from lpc_lightning.types import PairLosses, PreferenceBatch

BASELINES = ("prior", "no_latent")


@dataclass(frozen=True)
class AdaptationReport:
    """Results of `AdaptationPairs`."""

    annotators: Mapping[str, int] = field(default_factory=dict)
    """Number of pairs of each annotator."""
    scores: Mapping[str, Mapping[int, Score]] = field(default_factory=dict)
    """Scores by inference and number of labelled pairs; see `adaptation_scores`. A policy without codes is treated as
    one with a single code: labelled pairs change nothing, and `exact` allows a comparison over the same pairs."""
    baselines: Mapping[str, Score] = field(default_factory=dict)
    """`prior`: the policy under its prior, the same for all annotators. `no_latent`: the policy at z = 0, only if it
    has a latent."""
    weights: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """(K,) weights over the codes of each annotator, from all pairs of that annotator. Empty: no codes."""
    mixtures: Mapping[int, Mapping[PairKey, NDArray[np.float64]]] = field(default_factory=dict)
    """(K,) weights for each pair, by number of labelled pairs; see `adaptation_mixtures`."""

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies as metrics: `adaptation/exact/8`, `adaptation/prior`, `adaptation/no_latent` and so on."""
        metrics = {f"adaptation/{name}": score.accuracy for name, score in self.baselines.items()}
        for inference, scores in self.scores.items():
            metrics |= {f"adaptation/{inference}/{n}": score.accuracy for n, score in scores.items()}
        return metrics


class AdaptationPairs(nn.Module):
    """Collector of evaluated batches that measures the adaptation to annotators, over all devices."""

    def __init__(
        self, column: Group = "annotator", shots: Sequence[int] = SHOTS, rounds: int = 20, seed: int = 0
    ) -> None:
        """Start without pairs.

        Args:
            column: Label that identifies a pair's annotator. Pairs without this label are left out.
            shots: Numbers of labelled pairs.
            rounds: Number of random choices of the labelled pairs, which are averaged.
            seed: Seed of the random choices.

        Raises:
            ConfigError: A setting is out of range.
        """
        super().__init__()
        check_shots(shots, rounds)
        self.column, self.shots, self.rounds, self.seed = column, tuple(shots), rounds, seed
        self.table = PairTable()

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch.

        Args:
            evaluated: The result of `validation_step` or `test_step`.
            batch: The same batch.
            space: The module's latent space.
        """
        terms, states, score = evaluated["terms"], evaluated["states"], evaluated["score"]
        # The columns must be the same in every batch and on every device, including a batch without labelled pairs.
        numbers = {"prior": _margins(terms.pairs)}
        if terms.z is not None:
            numbers["no_latent"] = _margins(score.under(None)[0])
        if isinstance(space, DiscreteSpace):
            codes = space.codebook.weight
            numbers |= split_codes("log_prior", space.log_prior(states.prompt))
            numbers |= split_codes("losses", -score.under_codes(codes)[0].label_log_likelihood)
            numbers |= split_codes("swapped", -score.swapped().under_codes(codes)[0].label_log_likelihood)
        if isinstance(space, PosteriorSpace):
            numbers |= split_codes("log_posterior", space.log_posterior(states, score))
        self.table.update(numbers, pair_labels(batch))

    def reset(self) -> None:
        """Remove all pairs."""
        self.table.reset()

    def collect(self) -> AdaptationReport:
        """Compute the report over all pairs since the last call, on all devices, and remove the pairs."""
        numbers, rows = self.table.read()
        # Sorted by id, so that sums round equally for any batches and devices.
        order = sorted(
            (index for index, row in enumerate(rows) if row[self.column]), key=lambda index: str(rows[index]["id"])
        )
        self.reset()
        if not order:
            return AdaptationReport()
        columns = {name: values.numpy()[order] for name, values in numbers.items()}
        ids = [str(rows[index]["id"]) for index in order]
        annotators = [str(rows[index][self.column]) for index in order]
        prompts = [str(rows[index]["prompt"]) for index in order]
        tables = _tables(columns)
        report = AdaptationReport(
            annotators=dict(sorted(Counter(annotators).items())),
            scores=adaptation_scores(
                tables or single_code(columns["prior"]), ids, annotators, self.shots, self.rounds, self.seed, prompts
            ),
            baselines={
                name: mean_score(correct(columns[name]), np.array(annotators), np.array(prompts))
                for name in BASELINES
                if name in columns
            },
        )
        if tables is None:
            return report
        return replace(
            report,
            weights=code_weights(tables, annotators),
            mixtures=adaptation_mixtures(tables, ids, annotators, self.shots, self.seed),
        )


def _margins(pairs: PairLosses) -> Tensor:
    return pairs.chosen_rewards - pairs.rejected_rewards


def _tables(columns: Mapping[str, NDArray[np.float64]]) -> CodeTables | None:
    if "log_prior/0" not in columns:
        return None
    posterior = join_codes(columns, "log_posterior") if "log_posterior/0" in columns else None
    prior, losses, swapped = (join_codes(columns, name) for name in ("log_prior", "losses", "swapped"))
    return CodeTables(prior, losses, swapped, posterior)
