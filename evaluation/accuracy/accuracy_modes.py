"""Preference accuracy that cannot be fooled: the same pairs under the prior, the posterior, no z, and others' z.

`docs/accuracy_modes.md` tells how to read the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lpc_lightning.algorithms.metrics import PairMeans, accuracies
from lpc_lightning.algorithms.scoring import Evaluated
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row, pair_labels
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PairLosses, PairStates, PreferenceBatch

Group = Literal["source", "factor", "annotator"]
SWAPPED = "posterior_swapped"
"""Margins under the posterior that was handed the answers in the other order: no mode of its own."""
OTHERS = "(others)"
"""Takes the pairs of all groups but the largest."""


def mode_margins(evaluated: Evaluated, space: LatentSpace | None) -> dict[str, Tensor]:
    """The margin of each pair under every mode that the space has, from one backbone pass.

    A margin is the reward of the chosen answer less that of the rejected one, for `marginal` the log-odds of the label:

    - `prior`: as the policy is used; what the module's own accuracy is made of
    - `posterior`: z from the posterior, which is handed the label; `posterior_swapped`: handed the wrong one
    - `marginal`: log sum_k p_k exp(-l_k) of the pair as labelled, less that of the pair labelled the other way round
    - `no_latent`: z = 0
    - `shuffled`: the z of another pair of the batch; absent where the batch holds a single pair

    Args:
        evaluated: What `validation_step` or `test_step` returned.
        space: The module's latent space, or None.

    Returns:
        (B,) margins by mode. A policy without z has the mode `prior` alone.
    """
    terms, states, score = evaluated["terms"], evaluated["states"], evaluated["score"]
    margins = {"prior": _margins(terms.pairs)}
    if terms.z is None:
        return margins
    zs: dict[str, Tensor | None] = {"no_latent": None}
    if terms.z.shape[0] > 1:
        # By half a batch and not by one: pairs with the same prompt, and so the same z, often stand side by side.
        zs["shuffled"] = terms.z.roll(terms.z.shape[0] // 2, dims=0)
    if space is not None:
        exchanged = PairStates(prompt=states.prompt, chosen=states.rejected, rejected=states.chosen)
        z, swapped = space.posterior_z(states, score), space.posterior_z(exchanged, score.swapped())
        zs |= {} if z is None else {"posterior": z, SWAPPED: swapped}
        evidence, against = (space.log_evidence(states.prompt, scorer) for scorer in (score, score.swapped()))
        margins |= {} if evidence is None or against is None else {"marginal": evidence - against}
    return margins | {mode: _margins(score.under(z)[0]) for mode, z in zs.items()}


def turnover(one: Tensor, other: Tensor) -> Tensor:
    """1 where two predictions (the signs of margins) contradict each other, 0 where not; a tie against none is 1/2."""
    return (accuracies(one) - accuracies(other)).abs()


def _margins(pairs: PairLosses) -> Tensor:
    return (pairs.chosen_rewards - pairs.rejected_rewards).detach()


@dataclass(frozen=True)
class AccuracyReport:
    """What `AccuracyModes` has found."""

    metrics: dict[str, float] = field(default_factory=dict)
    """`accuracy/MODE`, `margin/MODE`, `swap_turnover`; the same behind `/source/NAME`, `/factor/NAME`, `/clean` and
    `/flipped`; `pairs`, `pairs/source/NAME` and so on."""
    standard_errors: dict[str, float] = field(default_factory=dict)
    """Of each mean among the metrics that stands on two pairs or more."""
    items: list[Row] = field(default_factory=list)
    """One row a pair: id, source, factor, annotator, flipped, and `margins` by mode."""


class AccuracyModes(nn.Module):
    """Accuracy and mean margin of every mode, over all pairs and group by group, over all devices."""

    def __init__(self, by: Sequence[Group] = ("source", "factor"), most: int = 32) -> None:
        """Start counting.

        Args:
            by: Labels by whose values pairs are told apart as well.
            most: Groups of each kind that are told apart, the largest ones; the others are taken together.
        """
        super().__init__()
        self.by, self.most = tuple(by), most
        self.table = PairTable()
        # Summed up as the module does it, so that the headline is the module's own to the last bit.
        self.headline = PairMeans()

    def update(self, evaluated: Evaluated, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Take in a batch; arguments as for `mode_margins`."""
        margins = mode_margins(evaluated, space)
        self.headline.update({"accuracy/prior": accuracies(margins["prior"]), "margin/prior": margins["prior"]})
        alone = "no_latent" in margins and "shuffled" not in margins
        if alone:
            margins["shuffled"] = torch.full_like(margins["prior"], torch.nan)
        self.table.update(dict(sorted(margins.items())), [{**row, "alone": alone} for row in pair_labels(batch)])

    def reset(self) -> None:
        """Forget all pairs."""
        self.table.reset()
        self.headline.reset()

    def collect(self) -> AccuracyReport:
        """What is known of all pairs since the last call, on all devices; starts anew."""
        margins, rows = self.table.read()
        if not rows:
            return AccuracyReport()
        means: dict[str, float] = {}
        errors: dict[str, float] = {}
        counts: dict[str, float] = {}
        alone = torch.tensor([row["alone"] for row in rows])
        for name, members in self._groups(rows).items():
            counts[f"pairs{name}"] = float(members.sum())
            for value, pairs in _values(margins, members, alone).items():
                means[value + name] = float(pairs.mean())
                if len(pairs) > 1:
                    errors[value + name] = float(pairs.std() / len(pairs) ** 0.5)
        if alone.any():
            counts["pairs/not_shuffled"] = float(alone.sum())
        means |= {name: float(value) for name, value in self.headline.compute().items()}
        items = [_item(row, margins, number) for number, row in enumerate(rows)]
        self.reset()
        return AccuracyReport(means | counts, errors, items)

    def _groups(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """(n,) which rows belong to a group, by the end of its metrics' names; "" is all of them."""
        groups = {"": torch.ones(len(rows), dtype=torch.bool)}
        flipped = torch.tensor([row["flipped"] for row in rows])
        if flipped.any():
            groups |= {"/clean": ~flipped, "/flipped": flipped}
        for kind in self.by:
            labels = largest([row[kind] for row in rows], self.most)
            for label in sorted({label for label in labels if label}):
                groups[f"/{kind}/{label}"] = torch.tensor([each == label for each in labels])
        return {name: members for name, members in groups.items() if members.any()}


def largest(labels: Sequence[str], most: int) -> list[str]:
    """The labels, those of all groups but the `most` largest replaced by one name. The empty label is no group."""
    sizes = Counter(sorted(label for label in labels if label))
    kept = {label for label, _ in sizes.most_common(most)} | {""}
    return [label if label in kept else OTHERS for label in labels]


def _values(margins: dict[str, Tensor], members: Tensor, alone: Tensor) -> dict[str, Tensor]:
    """The numbers of some pairs whose means are metrics, by name."""
    values: dict[str, Tensor] = {}
    for mode in (mode for mode in margins if mode != SWAPPED):
        chosen = margins[mode][members & ~alone if mode == "shuffled" else members]
        if len(chosen):
            values |= {f"accuracy/{mode}": accuracies(chosen), f"margin/{mode}": chosen}
    if SWAPPED in margins:
        values["swap_turnover"] = turnover(margins["posterior"][members], margins[SWAPPED][members])
    return values


def _item(row: Row, margins: dict[str, Tensor], number: int) -> Row:
    modes = [mode for mode in margins if not (mode == "shuffled" and row["alone"])]
    labels = {name: value for name, value in row.items() if name != "alone"}
    return labels | {"margins": {mode: float(margins[mode][number]) for mode in modes}}
