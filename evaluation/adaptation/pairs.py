"""Measure the adaptation to annotators from the tables of evaluated pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.adaptation.annotated_pairs import AnnotatedPairsTable, common_answers
from lpc_lightning.evaluation.adaptation.inference import OWN_MAJORITY, Table, code_weights, correct, others_majority
from lpc_lightning.evaluation.adaptation.policy import UNDER_Z
from lpc_lightning.evaluation.adaptation.scores import (
    SHOTS,
    PairKey,
    PairTables,
    Score,
    adaptation_mixtures,
    adaptation_scores,
    check_shots,
    labels_available,
    mean_score,
)
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PreferenceBatch

BASELINES = ("prior", "no_latent")
OTHERS_MAJORITY = "others_majority"
ADAPTED = "adapted"
"""Name of the headline, which policies of all kinds have."""
SHARE = "share_of_pairs"
"""Name of the share of the evaluated pairs that a number of labelled pairs allows to predict."""
NO_MAJORITY = "no majority labels: the pairs do not all have the same two answers."


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
    has a latent. `others_majority`: the label that most other annotators gave to the same prompt, only if all pairs
    have the same two answers."""
    weights: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """(K,) weights over the codes of each annotator, from all labelled pairs of that annotator. Empty: no codes."""
    mixtures: Mapping[str, Mapping[int, Mapping[PairKey, NDArray[np.float64]]]] = field(default_factory=dict)
    """(K,) weights for each pair, by inference and number of labelled pairs; see `adaptation_mixtures`. Empty: the
    policy cannot adapt."""
    has_majority: bool = False
    """True if all pairs have the same two answers."""
    labelled: Mapping[str, int] | None = None
    """Number of labelled pairs of each annotator. None: the other evaluated pairs are the labelled ones."""
    available: Mapping[str, int] = field(default_factory=dict)
    """Largest n of each annotator; see `labels_available`."""

    @property
    def metrics(self) -> dict[str, Score]:
        """Scores by the names of their metrics: `adaptation/exact/8`, `adaptation/prior` and so on.

        `adaptation/adapted/8` repeats `exact` of a policy with codes or without a latent, and `amortized_z` of a
        Gaussian latent.
        """
        metrics = {f"adaptation/{name}": score for name, score in self.baselines.items()}
        headline = f"amortized{UNDER_Z}" if self.mixtures and not self.weights else "exact"
        adapted = {ADAPTED: self.scores[headline]} if headline in self.scores else {}
        for inference, scores in {**self.scores, **adapted}.items():
            metrics |= {f"adaptation/{inference}/{n}": score for n, score in scores.items()}
        return metrics

    @property
    def shares_of_pairs(self) -> dict[str, float]:
        """Share of the evaluated pairs that are predicted from N labels, by the name of its metric.

        The others belong to annotators with fewer labels. Accuracies of two N with different shares are of different
        annotators.
        """
        total = sum(self.annotators.values())
        return {f"adaptation/{SHARE}/{n}": score.pairs / total for n, score in self.scores.get("exact", {}).items()}

    def too_few(self, n: int) -> list[int]:
        """Return the numbers of evaluated pairs of the annotators who have too few pairs for n labels."""
        return [count for name, count in self.annotators.items() if self.available[name] < n]


class AdaptationPairs(nn.Module):
    """Collector of evaluated batches that measures the adaptation to annotators, over all devices.

    Add pairs to `labelled` to take the labels from other pairs than the evaluated ones.
    """

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
        self.evaluated, self.labelled = AnnotatedPairsTable(column), AnnotatedPairsTable(column)

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch of evaluated pairs (see `AnnotatedPairsTable.update`)."""
        self.evaluated.update(evaluated, batch, space)

    def reset(self) -> None:
        """Remove all pairs."""
        self.evaluated.reset()
        self.labelled.reset()

    def collect(self) -> AdaptationReport:
        """Compute the report over all pairs since the last call, on all devices, and remove the pairs."""
        pairs, others = self.evaluated.collect(), self.labelled.collect()
        if not pairs.ids:
            return AdaptationReport()
        answers = common_answers(pairs, others)
        predicted = PairTables(pairs.tables(answers), pairs.ids, pairs.annotators, pairs.prompts, pairs.contents)
        labelled = None
        if others.ids:
            labelled = PairTables(others.tables(answers), others.ids, others.annotators, contents=others.contents)
        given = predicted if labelled is None else labelled
        scores = adaptation_scores(predicted, self.shots, self.rounds, self.seed, labelled)
        mixtures = adaptation_mixtures(predicted, self.shots, self.seed, labelled)
        annotators, prompts = np.array(pairs.annotators), np.array(pairs.prompts)
        right: dict[str, Table] = {name: correct(pairs.columns[name]) for name in BASELINES if name in pairs.columns}
        if predicted.tables.signs is not None:
            right[OTHERS_MAJORITY] = correct(others_majority(predicted.tables.signs, pairs.prompts, pairs.annotators))
        return AdaptationReport(
            annotators=dict(sorted(Counter(pairs.annotators).items())),
            labelled=None if labelled is None else dict(sorted(Counter(given.annotators).items())),
            available=labels_available(predicted, labelled),
            scores=scores,
            baselines={name: mean_score(values, annotators, prompts) for name, values in right.items()},
            weights=code_weights(given.tables, given.annotators) if pairs.has_codes else {},
            mixtures=mixtures
            if pairs.has_codes
            else {name: each for name, each in mixtures.items() if name != "exact"},
            has_majority=OWN_MAJORITY in scores,
        )
