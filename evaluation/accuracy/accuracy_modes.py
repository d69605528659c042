"""Preference accuracy of the same pairs under several choices of z: prior, posterior, none, and another pair's.

`docs/accuracy_modes.md` explains the numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.algorithms.metrics import PairMeans, accuracies
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row, pair_labels
from lpc_lightning.evaluation.statistics.calibration import calibration_error, wrong_label_auroc
from lpc_lightning.evaluation.statistics.clusters import standard_error
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PairLogps, PairLosses, PairStates, PreferenceBatch

Group = Literal["source", "factor", "annotator"]
"""Labels by which pairs can be grouped."""
SWAPPED = "posterior_swapped"
"""Key of the margins under the posterior of the swapped answers. It is used for `swap_turnover` and is not a mode."""
LABEL_CORRECT = "label_correct"
"""Key of the posterior that a label is correct, if the loss infers it, for `wrong_label_auroc/label_correct`."""
LENGTH_MATCHED = "/length_matched"
"""Suffix of metrics over pairs whose longer answer has less than `LENGTH_RATIO` times the tokens of the shorter one."""
LENGTH_RATIO = 1.5
OTHERS = "(others)"
"""Label of the pairs of all groups but the largest."""
LengthScale = Callable[[PairLogps], PairLogps]
"""Change of the answers' log-probabilities before the loss."""


def summed(logps: PairLogps) -> PairLogps:
    """Return log-probabilities that a loss cannot divide by lengths: sums over the tokens of each answer."""
    return replace(
        logps,
        chosen_lengths=torch.ones_like(logps.chosen_lengths),
        rejected_lengths=torch.ones_like(logps.rejected_lengths),
    )


def per_token(logps: PairLogps) -> PairLogps:
    """Return log-probabilities divided by the number of tokens of each answer, policy and reference alike."""
    chosen, rejected = logps.chosen_lengths, logps.rejected_lengths
    return summed(
        replace(
            logps,
            policy_chosen=logps.policy_chosen / chosen,
            policy_rejected=logps.policy_rejected / rejected,
            reference_chosen=None if logps.reference_chosen is None else logps.reference_chosen / chosen,
            reference_rejected=None if logps.reference_rejected is None else logps.reference_rejected / rejected,
        )
    )


LENGTH_SCALES: dict[str, LengthScale] = {"summed": summed, "per_token": per_token}
"""Rewards without and with length normalisation, for every algorithm."""


def mode_margins(
    evaluated: EvaluationOutput, space: LatentSpace | None, scales: Mapping[str, LengthScale] | None = None
) -> dict[str, Tensor]:
    """Compute the margin of each pair in every mode of the space, from one backbone pass.

    A margin is the reward of the chosen answer minus that of the rejected answer. In mode `marginal` it is the log-odds
    of the label. The modes are:

    - `prior`: z from the prior, as the policy is used. The module's own accuracy is computed from these margins.
    - `posterior`: z from the posterior, which uses the label. `posterior_swapped` uses the opposite label.
    - `marginal`: log sum_k p_k exp(-l_k) of the labelled pair, minus that of the pair with the opposite label.
    - `no_latent`: z = 0.
    - `shuffled`: z of another pair of the batch. Absent if the batch has a single pair.

    A loss that infers whether labels are correct (REPO) adds the key `LABEL_CORRECT`, the posterior that each label is
    correct. With a codebook, it is the exact posterior that sums out the code.

    Args:
        evaluated: The return value of `validation_step` or `test_step`.
        space: The module's latent space, or None.
        scales: Further scales of the answers' log-probabilities, by name (see `LENGTH_SCALES`). None: the algorithm's
            own only.

    Returns:
        (B,) margins by mode. A policy without z has the mode `prior` only. With scales, also the margins under each
        scale, by `MODE/SCALE`. They are from the same passes and under the same z.
    """
    terms, states, score = evaluated["terms"], evaluated["states"], evaluated["score"]
    scales = scales or {}

    def under_scales(mode: str, logps: PairLogps) -> dict[str, Tensor]:
        return {f"{mode}/{name}": _margins(score.losses(scale(logps))) for name, scale in scales.items()}

    margins = {"prior": _margins(terms.pairs)} | under_scales("prior", terms.logps)
    if terms.pairs.label_correct is not None:
        summed_out = None if space is None else space.label_correct(states.prompt, score)
        margins[LABEL_CORRECT] = terms.pairs.label_correct if summed_out is None else summed_out
    if terms.z is None:
        return margins
    zs: dict[str, Tensor | None] = {"no_latent": None}
    if terms.z.shape[0] > 1:
        # Shift by half a batch, not by one: neighbours often have the same prompt, and thus the same z.
        zs["shuffled"] = terms.z.roll(terms.z.shape[0] // 2, dims=0)
    if space is not None:
        swapped_states = PairStates(prompt=states.prompt, chosen=states.rejected, rejected=states.chosen)
        z, swapped_z = space.posterior_z(states, score), space.posterior_z(swapped_states, score.swapped())
        zs |= {} if z is None else {"posterior": z, SWAPPED: swapped_z}
        scorers = {"marginal": score} | {f"marginal/{name}": score.rescaled(scale) for name, scale in scales.items()}
        odds = {name: _log_odds(space, states, each) for name, each in scorers.items()}
        margins |= {name: value for name, value in odds.items() if value is not None}
    for mode, z in zs.items():
        pairs, logps = score.under(z)
        margins |= {mode: _margins(pairs)} | ({} if mode == SWAPPED else under_scales(mode, logps))
    return margins


def _log_odds(space: LatentSpace, states: PairStates, score: BatchScorer) -> Tensor | None:
    """Compute the log-odds (B,) of the labels with the code summed out. None without codes."""
    evidence, swapped = (space.log_evidence(states.prompt, each) for each in (score, score.swapped()))
    return None if evidence is None or swapped is None else evidence - swapped


def turnover(first: Tensor, second: Tensor) -> Tensor:
    """Compute 1 where two predictions (signs of margins) differ and 0 where they agree.

    A zero margin against a nonzero margin counts 1/2.
    """
    return (accuracies(first) - accuracies(second)).abs()


def _margins(pairs: PairLosses) -> Tensor:
    return (pairs.chosen_rewards - pairs.rejected_rewards).detach()


@dataclass(frozen=True)
class AccuracyReport:
    """Results of `AccuracyModes`."""

    metrics: dict[str, float] = field(default_factory=dict)
    """`accuracy/MODE`, `margin/MODE`, `log_loss/MODE` and `swap_turnover` over all pairs; the same with the suffixes
    `/source/NAME`, `/factor/NAME`, `/clean`, `/flipped` and `/length_matched`; the counts `pairs`, `pairs/source/NAME`
    and so on; over all pairs also `calibration_error/MODE`. If some labels are wrong, also
    `wrong_label_auroc/MODE`, and `gold_accuracy/MODE`, `gold_log_loss/MODE` and `gold_calibration_error/MODE` against
    the right labels. `longer_is_chosen` is the share of pairs whose chosen answer has more tokens."""
    standard_errors: dict[str, float] = field(default_factory=dict)
    """Standard error of each mean over the pairs of two prompts or more. Pairs of one prompt are not independent."""
    items: list[Row] = field(default_factory=list)
    """One row per pair: its labels (see `pair_labels`), `margins` by mode, and with scales `scaled`, the margins by
    `MODE/SCALE`."""


class AccuracyModes(nn.Module):
    """Accuracy and mean margin in every mode, over all pairs and for groups of pairs, over all devices."""

    def __init__(
        self,
        by: Sequence[Group] = ("source", "factor"),
        most: int = 32,
        scales: Mapping[str, LengthScale] | None = None,
    ) -> None:
        """Create empty counts.

        Args:
            by: Labels by which pairs are grouped.
            most: Maximum number of groups per label. The smaller groups are merged into one.
            scales: Further scales of the rewards (see `mode_margins`). Each adds `accuracy/MODE/SCALE` over all pairs.
        """
        super().__init__()
        self.by, self.most, self.scales = tuple(by), most, dict(scales or {})
        self.table = PairTable()
        # Summed like the module's own metric, so that both numbers are equal to the last bit.
        self.headline = PairMeans()

    def update(self, evaluated: EvaluationOutput, batch: PreferenceBatch, space: LatentSpace | None) -> None:
        """Add a batch. See `mode_margins` for the arguments."""
        margins = mode_margins(evaluated, space, self.scales)
        self.headline.update({"accuracy/prior": accuracies(margins["prior"]), "margin/prior": margins["prior"]})
        unshuffled = "no_latent" in margins and "shuffled" not in margins
        if unshuffled:
            names = ["shuffled", *(f"shuffled/{name}" for name in self.scales)]
            margins |= dict.fromkeys(names, torch.full_like(margins["prior"], torch.nan))
        self.table.update(
            dict(sorted(margins.items())), [{**row, "unshuffled": unshuffled} for row in pair_labels(batch)]
        )

    def reset(self) -> None:
        """Remove all pairs."""
        self.table.reset()
        self.headline.reset()

    def collect(self) -> AccuracyReport:
        """Return the results over all pairs since the last call, from all devices. Then remove all pairs."""
        columns, rows = self.table.read()
        if not rows:
            return AccuracyReport()
        scaled = {name: values for name, values in columns.items() if "/" in name}
        margins = {name: values for name, values in columns.items() if name not in scaled}
        means: dict[str, float] = {}
        errors: dict[str, float] = {}
        counts: dict[str, float] = {}
        unshuffled = torch.tensor([row["unshuffled"] for row in rows])
        flipped = torch.tensor([row["flipped"] for row in rows])
        wrong = flipped if flipped.any() else None
        longer = torch.tensor([row["tokens"][0] - row["tokens"][1] for row in rows], dtype=torch.float64)
        prompts = np.array([row["prompt"] for row in rows])
        for suffix, members in self._groups(rows).items():
            counts[f"pairs{suffix}"] = float(members.sum())
            by_length = longer if suffix in ("", LENGTH_MATCHED) else None
            for name, (values, scored) in _group_values(margins, members, unshuffled, wrong, by_length).items():
                means[name + suffix] = float(values.mean())
                error = standard_error(values.numpy(), prompts[scored.numpy()])
                if error is not None:
                    errors[name + suffix] = error
        for mode in (mode for mode in margins if mode not in (SWAPPED, "shuffled")):
            if mode != LABEL_CORRECT:
                means[f"calibration_error/{mode}"] = calibration_error(margins[mode])
                if flipped.any():
                    gold = torch.where(flipped, -margins[mode], margins[mode])
                    means[f"gold_calibration_error/{mode}"] = calibration_error(gold)
            if flipped.any() and not flipped.all():
                means[f"wrong_label_auroc/{mode}"] = wrong_label_auroc(margins[mode], flipped)
        for name, values in scaled.items():
            scored = ~values.isnan()
            if scored.any():
                means[f"accuracy/{name}"] = float(accuracies(values[scored]).mean())
                error = standard_error(accuracies(values[scored]).numpy(), prompts[scored.numpy()])
                errors |= {} if error is None else {f"accuracy/{name}": error}
        if unshuffled.any():
            counts["pairs/not_shuffled"] = float(unshuffled.sum())
        means |= {name: float(value) for name, value in self.headline.compute().items()}
        items = [_item(row, margins, index) for index, row in enumerate(rows)]
        for index, item in enumerate(items if scaled else ()):
            numbers = {name: float(column[index]) for name, column in scaled.items()}
            item["scaled"] = {name: number for name, number in numbers.items() if not math.isnan(number)}
        self.reset()
        return AccuracyReport(means | counts, errors, items)

    def _groups(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the members of each group as (n,) booleans, by the suffix of the group's metrics.

        The suffix "" stands for all rows.
        """
        groups = {"": torch.ones(len(rows), dtype=torch.bool)}
        flipped = torch.tensor([row["flipped"] for row in rows])
        if flipped.any():
            groups |= {"/clean": ~flipped, "/flipped": flipped}
        matched = torch.tensor([max(row["tokens"]) < LENGTH_RATIO * min(row["tokens"]) for row in rows])
        if not matched.all():
            groups |= {LENGTH_MATCHED: matched}
        for kind in self.by:
            labels = keep_largest([row[kind] for row in rows], self.most)
            for group in sorted({label for label in labels if label}):
                groups[f"/{kind}/{group}"] = torch.tensor([label == group for label in labels])
        return {suffix: members for suffix, members in groups.items() if members.any()}


def keep_largest(labels: Sequence[str], max_groups: int) -> list[str]:
    """Replace the labels of all groups but the `max_groups` largest by `OTHERS`. The empty label is not a group."""
    sizes = Counter(sorted(label for label in labels if label))
    kept = {label for label, _ in sizes.most_common(max_groups)} | {""}
    return [label if label in kept else OTHERS for label in labels]


def _group_values(
    margins: dict[str, Tensor], members: Tensor, unshuffled: Tensor, wrong: Tensor | None, longer: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return by metric the values of a group's pairs, and those pairs as (n,) booleans. The mean is the metric.

    Args:
        margins: (n,) margins of all pairs, by mode.
        members: (n,) True for the pairs of the group.
        unshuffled: (n,) True for pairs without the mode `shuffled`.
        wrong: (n,) True for wrong labels. None: no label is known to be wrong.
        longer: (n,) tokens of the chosen answer minus those of the other one. None: without these metrics.
    """
    values: dict[str, tuple[Tensor, Tensor]] = {}
    if longer is not None:
        values["longer_is_chosen"] = accuracies(longer[members]), members
    if longer is not None and wrong is not None:
        values["gold_longer_is_chosen"] = accuracies(torch.where(wrong, -longer, longer)[members]), members
    for mode in (mode for mode in margins if mode not in (SWAPPED, LABEL_CORRECT)):
        scored = members & ~unshuffled if mode == "shuffled" else members
        if scored.any():
            differences = margins[mode][scored]
            values[f"accuracy/{mode}"] = accuracies(differences), scored
            values[f"margin/{mode}"] = differences, scored
            values[f"log_loss/{mode}"] = softplus(-differences), scored
            if wrong is not None:
                gold = torch.where(wrong[scored], -differences, differences)
                values[f"gold_accuracy/{mode}"] = accuracies(gold), scored
                values[f"gold_log_loss/{mode}"] = softplus(-gold), scored
    if SWAPPED in margins:
        values["swap_turnover"] = turnover(margins["posterior"][members], margins[SWAPPED][members]), members
    return values


def _item(row: Row, margins: dict[str, Tensor], index: int) -> Row:
    modes = [mode for mode in margins if mode != LABEL_CORRECT and not (mode == "shuffled" and row["unshuffled"])]
    labels = {name: value for name, value in row.items() if name != "unshuffled"}
    if LABEL_CORRECT in margins:
        labels[LABEL_CORRECT] = float(margins[LABEL_CORRECT][index])
    return labels | {"margins": {mode: float(margins[mode][index]) for mode in modes}}
