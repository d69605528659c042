"""Batches with several pairs of the same annotator, so that these pairs share their evidence about the codes.

With hundreds of annotators, a shuffled batch of 8 pairs rarely has two pairs of the same annotator.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator

from lpc_lightning.data.batch_order.base import BatchOrder, OrderedPairs
from lpc_lightning.data.batch_order.runs import place_together
from lpc_lightning.data.sources.rows import DataError


class ByAnnotator(BatchOrder):
    """Several pairs of the same annotator in a batch: see `place_together`."""

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
        """See `place_together`."""
        return place_together(shuffled, pairs.annotators, batch_size, devices, self.pairs_per_annotator, generator)
