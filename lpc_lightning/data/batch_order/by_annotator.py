"""Batches with several pairs of the same annotator, so that these pairs share their evidence about the codes.

With hundreds of annotators, a shuffled batch of 8 pairs rarely has two pairs of the same annotator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Generator

from lpc_lightning.data.batch_order.base import BatchOrder, OrderedPairs
from lpc_lightning.data.batch_order.runs import place_together
from lpc_lightning.data.sources.rows import DataError


class ByAnnotator(BatchOrder):
    """Several pairs of the same annotator in a batch: see `place_together`."""

    pairs_per_annotator: int

    def __init__(self, pairs_per_annotator: int = 4, shared_prompts: bool = False) -> None:
        """Store the settings.

        Args:
            pairs_per_annotator: Number of pairs of the same annotator that are placed together in a training batch. It
                must divide data.batch_size. These pairs share their evidence about the codes (MarginalSpace,
                annotators).
            shared_prompts: Place pairs of the same prompts in a batch: those of annotators who labelled the same
                prompts, such as the statements of a conversation. A batch reads each of its prompts once. A name that
                is written into prompts (data.columns.named_in_prompt) does not change the batches.

        Raises:
            ValueError: The number is below 1.
        """
        if pairs_per_annotator < 1:
            raise ValueError(f"data.batch_order.pairs_per_annotator: found {pairs_per_annotator}, expected at least 1.")
        self.pairs_per_annotator, self.shared_prompts = pairs_per_annotator, shared_prompts

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
        places = prompt_places(pairs, generator) if self.shared_prompts else None
        run = self.pairs_per_annotator
        return place_together(shuffled, pairs.annotators, batch_size, devices, run, generator, places)


def prompt_places(pairs: OrderedPairs, generator: Generator) -> list[int]:
    """Return the place of each pair's prompt in a random order of the prompts.

    Prompts that annotators connect are next to each other: those of one annotator, those of another annotator of any of
    them, and so on.
    """
    numbers, prompts = np.unique(pairs.prompts, return_inverse=True)
    names, annotators = np.unique(pairs.annotators, return_inverse=True)
    known = np.array([bool(name) for name in pairs.annotators])
    edges = prompts[known], len(numbers) + annotators[known]
    nodes = len(numbers) + len(names)
    count, parts = connected_components(coo_array((np.ones(known.sum()), edges), shape=(nodes, nodes)), directed=False)
    part_order = torch.randperm(count, generator=generator).numpy()
    prompt_order = torch.randperm(len(numbers), generator=generator).numpy()
    places = np.empty(len(numbers), dtype=int)
    places[np.lexsort((prompt_order, part_order[parts[: len(numbers)]]))] = np.arange(len(numbers))
    found: list[int] = places[prompts].tolist()
    return found
