"""What the codes have come to stand for: how they are used, and how much they say about the labels of the pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lpc_lightning.algorithms.metrics import CodeUse, PairMeans, latent_values
from lpc_lightning.algorithms.scoring import Evaluated
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row, pair_labels
from lpc_lightning.evaluation.codebook.mutual_information import (
    entropy,
    mutual_information,
    normalised_information,
    quantile_bins,
    shuffled_information,
    shuffled_mean,
)
from lpc_lightning.evaluation.codebook.recovery import STATISTICS
from lpc_lightning.latent import DiscreteSpace, LatentSpace
from lpc_lightning.latent.divergence import categorical_kl
from lpc_lightning.seeding import derive
from lpc_lightning.types import PreferenceBatch

LABELS = ("source", "factor", "annotator")
TRUTHS = ("factor", "annotator")
"""Labels that codes may be hoped to recover."""
CODES = {"code": "", "posterior_code": "posterior_", "exact_code": "exact_"}
"""What the metrics of a code begin with, by its column."""


class CodeMass(CodeUse):
    """(K,) the mean distribution over the codes, over all pairs and devices."""

    def compute(self) -> Tensor:  # type: ignore[override]  # the distribution in place of what is told of it
        """Shares that sum up to 1."""
        return self.mass / self.mass.sum()


class PointSample(Metric):
    """The z of at most `most` pairs: always the same pairs, however many devices share them, and no draw."""

    full_state_update = False

    def __init__(self, most: int) -> None:
        """Start with none.

        Args:
            most: Points to keep.
        """
        super().__init__()
        self.most = most
        self.add_state("keys", [], dist_reduce_fx="cat")
        self.add_state("points", [], dist_reduce_fx="cat")
        self.keys: list[Tensor]
        self.points: list[Tensor]

    def update(self, points: Tensor, ids: tuple[str, ...]) -> None:
        """Take in (B, d) points of the pairs called `ids`."""
        self.points.append(points.detach().float().to(self.device))
        self.keys.append(torch.tensor([point_key(name) for name in ids], device=self.device))
        if sum(len(keys) for keys in self.keys) > 2 * self.most:
            keys, kept = self.compute()
            self.keys, self.points = [keys], [kept]

    def compute(self) -> tuple[Tensor, Tensor]:
        """(m,) keys (`point_key`) and (m, d) points, in the order of the keys."""
        keys, points = dim_zero_cat(self.keys), dim_zero_cat(self.points)
        kept = keys.argsort(stable=True)[: self.most]
        return keys[kept], points[kept]


def point_key(name: str) -> int:
    """A pair's place in the order by which points are kept, from its id."""
    return derive("point", name)


@dataclass(frozen=True)
class CodebookReport:
    """What `CodebookStatistics` has found over all pairs, on all devices."""

    metrics: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """One a pair: id, source, factor, annotator, flipped."""
    codes: NDArray[np.int64] | None = None
    """(n,) the prior's likeliest code for each pair; None where there are no codes."""
    prior: NDArray[np.float64] | None = None
    """(K,) the mean prior."""
    posterior: NDArray[np.float64] | None = None
    """(K,) the mean posterior, where there is one."""
    points: NDArray[np.float32] | None = None
    """(m, d) z of some pairs."""
    point_rows: list[Row] = field(default_factory=list)
    """The rows of those pairs."""


class CodebookStatistics(nn.Module):
    """Takes in validation batches and says what the latent has made of them; idle where the policy has no z."""

    def __init__(self, space: LatentSpace | None, most_points: int = 1000) -> None:
        """Start counting.

        Args:
            space: The module's latent space.
            most_points: Pairs whose z is kept.
        """
        super().__init__()
        codes = space.num_codes if isinstance(space, DiscreteSpace) else 0
        self.table, self.means, self.sample = PairTable(), PairMeans(), PointSample(most_points)
        self.prior, self.posterior = CodeMass(codes), CodeMass(codes)

    def update(self, evaluated: Evaluated, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Take in a batch: what `validation_step` returned for it, and the module's latent space."""
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
            known = replace(terms, posterior=posterior, kl=categorical_kl(posterior, terms.prior))
            logged = latent_values(terms, states)  # by the module, which runs no posterior in validation
            values = latent_values(known, states)
            self.means.update({name: value for name, value in values.items() if name not in logged})
        exact = space.log_exact_posterior(states, score)
        if exact is not None:
            numbers["exact_code"] = exact.argmax(-1)
        self.table.update(numbers, pair_labels(batch))
        self.sample.update(terms.z, batch.ids)

    def reset(self) -> None:
        """Forget all pairs."""
        for metric in (self.table, self.means, self.sample, self.prior, self.posterior):
            metric.reset()

    def collect(self) -> CodebookReport:
        """What is known of all pairs since the last call, on all devices; starts anew."""
        numbers, rows = self.table.read()
        if not rows:
            return CodebookReport()
        keys, points = self.sample.compute()
        by_key = {point_key(row["id"]): row for row in rows}
        prior, posterior = (_shares(mass) for mass in (self.prior, self.posterior))
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
            point_rows=[by_key[int(key)] for key in keys],
        )
        self.reset()
        return report


def information(numbers: dict[str, Tensor], rows: list[Row]) -> dict[str, float]:
    """Mutual information in nats between the likeliest codes and the labels of the pairs.

    For each label (source, factor, annotator, and the difference of the answers' lengths in quartiles) that has two
    values or more, over the pairs that have it: the estimate, `_normalised` (0 to 1), and `_shuffled`, what the same
    estimate says of shuffled labels: that much is chance.

    Args:
        numbers: (n,) `length_difference` in tokens, and codes: the prior's (`code`), that of the space's posterior
            (`posterior_code`) and that of the exact one (`exact_code`), where there are such.
        rows: The labels of each pair.
    """
    labels = {name: np.array([row[name] for row in rows]) for name in LABELS}
    labels["length_difference"] = quantile_bins(numbers["length_difference"].numpy()).astype(str)
    found = {}
    for prefix, name, codes, values in _labelled(numbers, labels):
        metric = f"{prefix}mutual_information/{name}"
        found[metric] = mutual_information(codes, values)
        found[f"{metric}_normalised"] = normalised_information(codes, values)
        found[f"{metric}_shuffled"] = shuffled_information(codes, values, seed=derive(metric))
    return found


def recovery(numbers: dict[str, Tensor], rows: list[Row]) -> dict[str, float]:
    """How well the likeliest codes name the factor or the annotator: `codebook/matched/LABEL`, `codebook/purity/LABEL`.

    Each with `_shuffled`, which is what chance has. Labels, pairs and arguments as for `information`, whose
    `_normalised` is the third measure of the same thing.
    """
    labels = {name: np.array([row[name] for row in rows]) for name in TRUTHS}
    found = {}
    for prefix, name, codes, values in _labelled(numbers, labels):
        for kind, statistic in STATISTICS.items():
            metric = f"codebook/{prefix}{kind}/{name}"
            found[metric] = statistic(codes, values)
            found[f"{metric}_shuffled"] = shuffled_mean(statistic, codes, values, seed=derive(metric))
    return found


def _labelled(
    numbers: dict[str, Tensor], labels: dict[str, NDArray[np.str_]]
) -> Iterator[tuple[str, str, NDArray[np.int64], NDArray[np.str_]]]:
    """Each kind of code against each label of two values or more, over the pairs that have it.

    Gives the prefix of the code's metrics, the label's name, the codes and the labels.
    """
    for column, prefix in CODES.items():
        for name, values in labels.items():
            members = values != ""
            if column in numbers and len(np.unique(values[members])) > 1:
                yield prefix, name, numbers[column].long().numpy()[members], values[members]


def _shares(mass: CodeMass) -> NDArray[np.float64] | None:
    return mass.compute().cpu().numpy() if mass.update_called else None
