"""Statistics of the codebook: how often codes are used, and how much they reveal about the labels of the pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lpc_lightning.algorithms.metrics import CodeUse, PairMeans, latent_values
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row, pair_labels
from lpc_lightning.evaluation.codebook.mutual_information import (
    entropy,
    mutual_information,
    normalized_information,
    quantile_bins,
    shuffled_information,
    shuffled_mean,
)
from lpc_lightning.evaluation.codebook.recovery import STATISTICS
from lpc_lightning.latent import LatentSpace
from lpc_lightning.latent.discrete import categorical_kl
from lpc_lightning.seeding import derive
from lpc_lightning.types import PreferenceBatch

LABELS = ("source", "factor", "annotator")
RECOVERABLE_LABELS = ("factor", "annotator")
"""Labels that the codes should ideally recover."""
METRIC_PREFIXES = {"code": "", "posterior_code": "posterior_", "exact_code": "exact_"}
"""Prefix of a code's metrics, by the column of the code."""


class CodeMass(CodeUse):
    """Mean distribution over the codes (K,), over all pairs and devices."""

    def compute(self) -> Tensor:  # type: ignore[override]  # returns the distribution, not statistics of it
        """Return (K,) shares that sum to 1."""
        return self.mass / self.mass.sum()


class PointSample(Metric):
    """z of at most `max_points` pairs.

    The choice depends on the keys of the pairs only. It is the same for every number of devices, and nothing is random.
    """

    full_state_update = False

    def __init__(self, max_points: int) -> None:
        """Create an empty sample.

        Args:
            max_points: Maximum number of points to keep.
        """
        super().__init__()
        self.max_points = max_points
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("points", [], dist_reduce_fx="cat")
        self.keys: list[Tensor]
        self.points: list[Tensor]

    def update(self, points: Tensor, rows: Sequence[Row]) -> None:
        """Add points (B, d) of the pairs with these labels."""
        self.points.append(points.detach().float().to(self.device))
        self.keys.append(torch.tensor([point_key(row) for row in rows], device=self.device))
        if sum(len(keys) for keys in self.keys) > 2 * self.max_points:
            # Not `compute`: torchmetrics would gather the points of all devices, and each device would keep them.
            keys, kept = self._smallest()
            self.keys, self.points = [keys], [kept]

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return (m,) keys (see `point_key`) and (m, d) points, sorted by key."""
        return self._smallest()

    def _smallest(self) -> tuple[Tensor, Tensor]:
        keys, points = dim_zero_cat(self.keys), dim_zero_cat(self.points)
        kept = keys.argsort(stable=True)[: self.max_points]
        return keys[kept], points[kept]


def point_key(row: Row) -> int:
    """Compute a pair's sort key. `PointSample` keeps the points with the smallest keys.

    Ids may repeat across annotators, prompts, and the data sets of a mixture.
    """
    return derive("point", row["id"], row["annotator"], row["source"], row["prompt"])


@dataclass(frozen=True)
class CodebookReport:
    """Results of `CodebookStatistics` over all pairs, from all devices."""

    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """One row per pair: id, source, factor, annotator, flipped."""
    codes: NDArray[np.int64] | None = None
    """(n,) the prior's likeliest code for each pair. None if the space has no codes."""
    prior: NDArray[np.float64] | None = None
    """(K,) the mean prior. None if the space has no codes."""
    posterior: NDArray[np.float64] | None = None
    """(K,) the mean posterior. None if the space has no posterior."""
    points: NDArray[np.float32] | None = None
    """(m, d) z of some of the pairs."""
    point_rows: list[Row] = field(default_factory=list)
    """The rows of those pairs."""


class CodebookStatistics(nn.Module):
    """Statistics of the latent over validation batches. Collects nothing if the policy has no z."""

    def __init__(self, space: LatentSpace | None, most_points: int = 1000) -> None:
        """Create empty statistics.

        Args:
            space: The module's latent space.
            most_points: Maximum number of pairs whose z is kept.
        """
        super().__init__()
        codes = space.num_codes if space is not None and space.has_codes else 0
        self.table, self.means, self.sample = PairTable(), PairMeans(), PointSample(most_points)
        self.prior, self.posterior = CodeMass(codes), CodeMass(codes)

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch.

        Args:
            evaluated: The return value of `validation_step` for the batch.
            batch: The batch.
            space: The module's latent space.
        """
        terms, states, score = evaluated["terms"], evaluated["states"], evaluated["score"]
        if space is None or terms.z is None:
            return
        chosen, rejected = batch.lengths.chunk(2)
        numbers = {"length_difference": chosen - rejected}
        if terms.prior is not None:
            numbers["code"] = terms.prior.argmax(-1)
            self.prior.update(terms.prior)
        posterior = space.log_posterior(states, score)
        if posterior is not None and terms.prior is not None:
            numbers["posterior_code"] = posterior.argmax(-1)
            self.posterior.update(posterior)
            full_terms = replace(terms, posterior=posterior, kl=categorical_kl(posterior, terms.prior))
            logged = latent_values(terms, states)  # the module logs these; it computes no posterior in validation
            values = latent_values(full_terms, states)
            self.means.update({name: value for name, value in values.items() if name not in logged})
        exact = space.log_exact_posterior(states, score)
        if exact is not None:
            numbers["exact_code"] = exact.argmax(-1)
        rows = pair_labels(batch)
        self.table.update(numbers, rows)
        self.sample.update(terms.z, rows)

    def reset(self) -> None:
        """Remove all pairs."""
        for metric in (self.table, self.means, self.sample, self.prior, self.posterior):
            metric.reset()

    def collect(self) -> CodebookReport:
        """Return the statistics of all pairs since the last call, from all devices. Then remove all pairs."""
        numbers, rows = self.table.read()
        if not rows:
            return CodebookReport()
        keys, points = self.sample.compute()
        keys = keys.view(-1)  # torchmetrics turns a single number into a scalar
        rows_by_key = {point_key(row): row for row in rows}
        prior, posterior = (_mean_distribution(mass) for mass in (self.prior, self.posterior))
        metrics: dict[str, float] = {}
        if posterior is not None:
            metrics |= {name: float(value) for name, value in self.means.compute().items()}
            metrics["latent/posterior_perplexity"] = float(np.exp(entropy(posterior)))
        report = CodebookReport(
            metrics=metrics | information(numbers, rows) | recovery(numbers, rows),
            rows=rows,
            codes=numbers["code"].long().numpy() if "code" in numbers else None,
            prior=prior,
            posterior=posterior,
            points=points.cpu().numpy(),
            point_rows=[rows_by_key[int(key)] for key in keys],
        )
        self.reset()
        return report


def information(numbers: dict[str, Tensor], rows: list[Row]) -> dict[str, float]:
    """Compute the mutual information between the likeliest codes and the labels of the pairs, in nats.

    The labels are source, factor, annotator, and the difference of the answers' lengths in quartiles. Pairs without a
    label are left out. Labels with a single value are left out. There are three metrics per label: the estimate,
    `_normalized` (0 to 1), and `_shuffled`, the estimate for labels that are shuffled between prompts. `_shuffled` is
    the part of the estimate that is due to chance.

    Args:
        numbers: (n,) `length_difference` in tokens, and the likeliest codes. The codes are those of the prior (`code`),
            of the space's posterior (`posterior_code`) and of the exact posterior (`exact_code`), if they exist.
        rows: Labels of each pair.
    """
    labels = {name: np.array([row[name] for row in rows]) for name in LABELS}
    labels["length_difference"] = quantile_bins(numbers["length_difference"].numpy()).astype(str)
    metrics = {}
    for prefix, name, codes, values, prompts in _codes_and_labels(numbers, labels, rows):
        metric = f"{prefix}mutual_information/{name}"
        metrics[metric] = mutual_information(codes, values)
        metrics[f"{metric}_normalized"] = normalized_information(codes, values)
        metrics[f"{metric}_shuffled"] = shuffled_information(codes, values, prompts, seed=derive(metric))
    return metrics


def recovery(numbers: dict[str, Tensor], rows: list[Row]) -> dict[str, float]:
    """Compute how well the likeliest codes predict the factor or the annotator of a pair.

    The metrics are `codebook/matched/LABEL` and `codebook/purity/LABEL`. Each has a `_shuffled` metric, its value for
    labels that are shuffled between prompts. Labels, pairs and arguments are those of `information`. The `_normalized`
    metric there is a third measure of the same property.
    """
    labels = {name: np.array([row[name] for row in rows]) for name in RECOVERABLE_LABELS}
    metrics = {}
    for prefix, name, codes, values, prompts in _codes_and_labels(numbers, labels, rows):
        for kind, statistic in STATISTICS.items():
            metric = f"codebook/{prefix}{kind}/{name}"
            metrics[metric] = statistic(codes, values)
            metrics[f"{metric}_shuffled"] = shuffled_mean(statistic, codes, values, prompts, seed=derive(metric))
    return metrics


def _codes_and_labels(
    numbers: dict[str, Tensor], labels: dict[str, NDArray[np.str_]], rows: list[Row]
) -> Iterator[tuple[str, str, NDArray[np.int64], NDArray[np.str_], NDArray[np.str_]]]:
    """Yield each kind of code with each label that has two values or more, over the pairs with that label.

    Yields:
        The prefix of the code's metrics, the label's name, the codes, the labels, and the prompts.
    """
    prompts = np.array([row["prompt"] for row in rows])
    for column, prefix in METRIC_PREFIXES.items():
        for name, values in labels.items():
            members = values != ""
            if column in numbers and len(np.unique(values[members])) > 1:
                yield prefix, name, numbers[column].long().numpy()[members], values[members], prompts[members]


def _mean_distribution(mass: CodeMass) -> NDArray[np.float64] | None:
    return mass.compute().view(-1).cpu().numpy() if mass.update_called else None
