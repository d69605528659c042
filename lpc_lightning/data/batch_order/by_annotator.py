"""Batches with several pairs of the same annotator, so that these pairs share their evidence about the codes.

With hundreds of annotators, a shuffled batch of 8 pairs rarely has two pairs of the same annotator. Here the shuffled
pairs of each annotator are split into runs, and batches are filled with runs. Every pair is still used once in an
epoch, and a full batch is equally likely in each step of the epoch. Only the pairs that share a batch change.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Generator

from lpc_lightning.data.batch_order.base import BatchOrder, OrderedPairs
from lpc_lightning.data.sources.rows import DataError


def group_by_annotator(
    order: Sequence[int], annotators: Sequence[str], batch_size: int, devices: int, run: int, generator: Generator
) -> list[int]:
    """Reorder shuffled pairs so that the batches of each device contain runs of pairs of one annotator.

    Args:
        order: Pairs in the order of plain shuffling.
        annotators: Annotator of each pair. A pair without an annotator (`""`) is a run of its own.
        batch_size: Number of pairs in a batch of one device.
        devices: Number of devices n. Each device takes every n-th pair.
        run: Number of pairs in a run. The last run of an annotator may be shorter. If `run` divides the batch size, no
            full run is split.
        generator: Random generator that shuffles runs and batches.

    Returns:
        The same pairs. The pairs at the end that do not fill a step keep their order.
    """
    full = len(order) // (batch_size * devices) * batch_size * devices
    by_annotator: dict[str, list[int]] = {}
    for pair in order[:full]:
        by_annotator.setdefault(annotators[pair], []).append(pair)
    runs = [[pair] for pair in by_annotator.pop("", [])]
    runs += [pairs[start : start + run] for pairs in by_annotator.values() for start in range(0, len(pairs), run)]
    # Full runs are first and fill whole batches. Shorter runs follow, sorted by size.
    mixed = sorted(_shuffled(runs, generator), key=len, reverse=True)
    pairs = list(chain.from_iterable(mixed))
    batches = _shuffled([pairs[start : start + batch_size] for start in range(0, full, batch_size)], generator)
    steps = [batches[start : start + devices] for start in range(0, len(batches), devices)]
    dealt = [pair for step in steps for pair in chain.from_iterable(zip(*step, strict=True))]
    return [*dealt, *order[full:]]


def _shuffled(values: Sequence[list[int]], generator: Generator) -> list[list[int]]:
    return [values[number] for number in torch.randperm(len(values), generator=generator).tolist()]


class ByAnnotator(BatchOrder):
    """Several pairs of the same annotator in a batch: see `group_by_annotator`."""

    pairs_per_annotator: int

    def __init__(self, pairs_per_annotator: int = 4) -> None:
        """Store the setting.

        Args:
            pairs_per_annotator: Number of pairs of the same annotator that are placed together in a training batch. It
                must divide data.batch_size. These pairs share their evidence about the codes (MarginalSpace,
                annotators).

        Raises:
            ValueError: The number is below 1.
        """
        if pairs_per_annotator < 1:
            raise ValueError(f"data.batch_order.pairs_per_annotator: found {pairs_per_annotator}, expected at least 1.")
        self.pairs_per_annotator = pairs_per_annotator

    def check_batch_size(self, batch_size: int) -> None:
        """See `BatchOrder.check_batch_size`."""
        if batch_size % self.pairs_per_annotator:
            raise ValueError(
                f"data.batch_order.pairs_per_annotator: found {self.pairs_per_annotator}, expected a divisor of "
                f"data.batch_size ({batch_size})."
            )

    def check_pairs(self, pairs: OrderedPairs) -> None:
        """See `BatchOrder.check_pairs`."""
        if not any(pairs.annotators):
            raise DataError(
                f"data.batch_order: found {self} and no annotator in {len(pairs)} training pairs, expected a column "
                "`annotator`. Set data.columns.annotator if the column has another name, or data.batch_order to null."
            )

    def arrange(
        self, shuffled: Sequence[int], pairs: OrderedPairs, batch_size: int, devices: int, generator: Generator
    ) -> list[int]:
        """See `group_by_annotator`."""
        return group_by_annotator(shuffled, pairs.annotators, batch_size, devices, self.pairs_per_annotator, generator)
