"""What few-shot inference needs of each pair, taken from evaluated batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lpc_lightning.algorithms.scoring import Evaluated
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, pair_labels
from lpc_lightning.evaluation.adaptation.inference import CodeTables, code_weights, correct, single_code
from lpc_lightning.evaluation.adaptation.scores import (
    SHOTS,
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
    """What `AdaptationPairs` has found."""

    annotators: Mapping[str, int] = field(default_factory=dict)
    """How many pairs each of them labelled."""
    scores: Mapping[str, Mapping[int, Score]] = field(default_factory=dict)
    """By inference and labelled pairs given; see `adaptation_scores`. A policy without codes counts as one with a
    single
    code, of which labelled pairs change nothing: it has `exact`, for comparison over the same pairs."""
    baselines: Mapping[str, Score] = field(default_factory=dict)
    """`prior`: the policy as it is used, for any annotator. `no_latent`: the same at z = 0, where it has a latent."""
    weights: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """(K,) each annotator's weights over the codes, from all their pairs. Empty where the policy has no codes."""
    mixtures: Mapping[int, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict)
    """(K,) weights for a pair, from some others of its annotator, by how many and its id: see `adaptation_mixtures`."""

    @property
    def metrics(self) -> dict[str, float]:
        """`adaptation/exact/8` and so on, `adaptation/prior`, and `adaptation/no_latent` where there is a latent."""
        found = {f"adaptation/{name}": each.accuracy for name, each in self.baselines.items()}
        for kind, scores in self.scores.items():
            found |= {f"adaptation/{kind}/{n}": each.accuracy for n, each in scores.items()}
        return found


class AdaptationPairs(nn.Module):
    """Takes in batches, and says how well each annotator's labels follow from some of them, over all devices."""

    def __init__(
        self, column: Group = "annotator", shots: Sequence[int] = SHOTS, rounds: int = 20, seed: int = 0
    ) -> None:
        """Start with no pairs.

        Args:
            column: The label that says whose pair it is; pairs without one are left out.
            shots: Labelled pairs to give.
            rounds: Random choices of them to average over.
            seed: Of these.

        Raises:
            ConfigError: A setting out of range.
        """
        super().__init__()
        check_shots(shots, rounds)
        self.column, self.shots, self.rounds, self.seed = column, tuple(shots), rounds, seed
        self.table = PairTable()

    def update(self, evaluated: Evaluated, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Take in a batch: what `validation_step` or `test_step` returned for it, and the module's latent space."""
        terms, states, score = evaluated["terms"], evaluated["states"], evaluated["score"]
        # The same columns in every batch, and on every device: that of no labelled pair, too.
        numbers = {"prior": _margins(terms.pairs)}
        if terms.z is not None:
            numbers["no_latent"] = _margins(score.under(None)[0])
        if isinstance(space, DiscreteSpace):
            codes = space.codebook.weight
            numbers |= _by_code("log_prior", space.log_prior(states.prompt))
            numbers |= _by_code("losses", -score.under_codes(codes)[0].label_log_likelihood)
            numbers |= _by_code("swapped", -score.swapped().under_codes(codes)[0].label_log_likelihood)
        if isinstance(space, PosteriorSpace):
            numbers |= _by_code("log_posterior", space.log_posterior(states, score))
        self.table.update(numbers, pair_labels(batch))

    def reset(self) -> None:
        """Forget all pairs."""
        self.table.reset()

    def collect(self) -> AdaptationReport:
        """What is known of all pairs since the last call, on all devices; starts anew."""
        numbers, rows = self.table.read()
        # In the order of their names: sums round alike whatever the batches and the devices.
        order = sorted(
            (place for place, row in enumerate(rows) if row[self.column]), key=lambda place: str(rows[place]["id"])
        )
        self.reset()
        if not order:
            return AdaptationReport()
        columns = {name: values.numpy()[order] for name, values in numbers.items()}
        ids = [str(rows[place]["id"]) for place in order]
        annotators = [str(rows[place][self.column]) for place in order]
        tables = _tables(columns)
        found = AdaptationReport(
            annotators=dict(sorted(Counter(annotators).items())),
            scores=adaptation_scores(
                tables or single_code(columns["prior"]), ids, annotators, self.shots, self.rounds, self.seed
            ),
            baselines={
                name: mean_score(correct(columns[name]), np.array(annotators)) for name in BASELINES if name in columns
            },
        )
        if tables is None:
            return found
        return replace(
            found,
            weights=code_weights(tables, annotators),
            mixtures=adaptation_mixtures(tables, ids, annotators, self.shots, self.seed),
        )


def _margins(pairs: PairLosses) -> Tensor:
    return pairs.chosen_rewards - pairs.rejected_rewards


def _by_code(name: str, values: Tensor) -> dict[str, Tensor]:
    """(B, K) as K columns."""
    return {f"{name}/{code}": value for code, value in enumerate(values.unbind(-1))}


def _tables(columns: Mapping[str, NDArray[np.float64]]) -> CodeTables | None:
    def table(kind: str) -> NDArray[np.float64] | None:
        found = [values for name, values in columns.items() if name.startswith(f"{kind}/")]
        return np.stack(found, axis=-1) if found else None

    prior, losses, swapped = (table(kind) for kind in ("log_prior", "losses", "swapped"))
    if prior is None or losses is None or swapped is None:
        return None
    return CodeTables(prior, losses, swapped, table("log_posterior"))
