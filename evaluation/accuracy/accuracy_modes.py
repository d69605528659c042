"""Preference accuracy in every mode of z, over all pairs and for groups of pairs.

`docs/accuracy_modes.md` explains the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lpc_lightning.algorithms.metrics import PairMeans, accuracies
from lpc_lightning.algorithms.outputs import EvaluationOutput
from lpc_lightning.evaluation.accuracy.mode_margins import LengthScale, mode_margins, shuffle_partners
from lpc_lightning.evaluation.accuracy.pair_table import PairTable, Row, pair_labels
from lpc_lightning.evaluation.accuracy.scored_modes import LENGTH_MATCHED, LENGTH_RATIO, ScoredPairs
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import PreferenceBatch

Group = Literal["source", "factor", "annotator"]
"""Labels by which pairs can be grouped."""
MOST_GROUPS = 32
"""Default maximum number of groups per label."""
OTHERS = "(others)"
"""Label of the pairs of all groups but the largest."""


@dataclass(frozen=True)
class AccuracyReport:
    """Results of `AccuracyModes`."""

    metrics: dict[str, float] = field(default_factory=dict)
    """`accuracy/MODE`, `margin/MODE`, `log_loss/MODE` and `swap_turnover` over all pairs; the same with the suffixes
    `/source/NAME`, `/factor/NAME`, `/clean`, `/flipped` and `/length_matched`; the counts `pairs`, `pairs/source/NAME`
    and so on; over all pairs also `calibration_error/MODE`. If pairs have gold labels or some are flipped, also
    `gold_accuracy/MODE`, `gold_log_loss/MODE` and `gold_calibration_error/MODE` against the right labels, and if some
    labels are wrong `wrong_label_auroc/MODE`. `longer_is_chosen` is the share of pairs whose chosen answer has more
    tokens."""
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
        most: int = MOST_GROUPS,
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
        """Add a batch. See `mode_margins` for `evaluated` and `space`."""
        partners = shuffle_partners(batch.prompts)
        margins = mode_margins(evaluated, space, partners, self.scales)
        self.headline.update({"accuracy/prior": accuracies(margins["prior"]), "margin/prior": margins["prior"]})
        unshuffled = ["shuffled" in margins and partner is None for partner in partners]
        rows = [{**row, "unshuffled": each} for row, each in zip(pair_labels(batch), unshuffled, strict=True)]
        self.table.update(dict(sorted(margins.items())), rows)

    def reset(self) -> None:
        """Remove all pairs."""
        self.table.reset()
        self.headline.reset()

    def collect(self) -> AccuracyReport:
        """Return the results over all pairs since the last call, from all devices. Then remove all pairs."""
        columns, rows = self.table.read()
        if not rows:
            return AccuracyReport()
        pairs = ScoredPairs.from_columns(columns, rows)
        groups = group_members(rows, self.by, self.most)
        means, errors = pairs.means(groups)
        means |= pairs.calibration()
        means |= {name: float(value) for name, value in self.headline.compute().items()}
        counts = {f"pairs{suffix}": float(members.sum()) for suffix, members in groups.items()}
        if pairs.unshuffled.any():
            counts["pairs/not_shuffled"] = float(pairs.unshuffled.sum())
        self.reset()
        return AccuracyReport(means | counts, errors, pairs.items())


def group_members(rows: Sequence[Row], by: Sequence[Group], most: int = MOST_GROUPS) -> dict[str, Tensor]:
    """Return the members of each group as (n,) booleans, by the suffix of the group's metrics.

    The suffix "" stands for all rows.

    Args:
        rows: Labels of each pair.
        by: Labels by which pairs are grouped.
        most: Maximum number of groups per label; see `keep_largest`.
    """
    groups = {"": torch.ones(len(rows), dtype=torch.bool)}
    flipped = torch.tensor([row["flipped"] for row in rows])
    if flipped.any():
        groups |= {"/clean": ~flipped, "/flipped": flipped}
    matched = torch.tensor([max(row["tokens"]) < LENGTH_RATIO * min(row["tokens"]) for row in rows])
    if not matched.all():
        groups |= {LENGTH_MATCHED: matched}
    for kind in by:
        labels = keep_largest([row[kind] for row in rows], most)
        for group in sorted({label for label in labels if label}):
            groups[f"/{kind}/{group}"] = torch.tensor([label == group for label in labels])
    return {suffix: members for suffix, members in groups.items() if members.any()}


def keep_largest(labels: Sequence[str], max_groups: int) -> list[str]:
    """Replace the labels of all groups but the `max_groups` largest by `OTHERS`. The empty label is not a group."""
    sizes = Counter(sorted(label for label in labels if label))
    kept = {label for label, _ in sizes.most_common(max_groups)} | {""}
    return [label if label in kept else OTHERS for label in labels]
