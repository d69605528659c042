"""Batches with several pairs of the same prompt, so that the prompt and shared answers are read once.

A ranking of K answers gives K (K - 1) / 2 pairs. InstructGPT (arXiv 2203.02155, section 3.5) takes all of them in one
batch, because then each answer needs one pass, and because an answer that is in several steps of an epoch overfits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Generator

from lpc_lightning.data.batch_order.base import BatchOrder, OrderedPairs
from lpc_lightning.data.batch_order.runs import place_together


class ByPrompt(BatchOrder):
    """Several pairs of the same prompt in a batch: see `place_together`."""

    def __init__(self, pairs_per_prompt: int | None = None) -> None:
        """Store the setting.

        Args:
            pairs_per_prompt: Maximum number of pairs of the same prompt that are placed together in a training batch.
                For rankings of K answers, K (K - 1) / 2. null: as many as fill a batch.

        Raises:
            ValueError: The number is below 1.
        """
        if pairs_per_prompt is not None and pairs_per_prompt < 1:
            raise ValueError(f"data.batch_order.pairs_per_prompt: found {pairs_per_prompt}, expected at least 1.")
        self.pairs_per_prompt = pairs_per_prompt

    def arrange(
        self, shuffled: Sequence[int], pairs: OrderedPairs, batch_size: int, devices: int, generator: Generator
    ) -> list[int]:
        """See `place_together`."""
        run = min(self.pairs_per_prompt or batch_size, batch_size)
        return place_together(shuffled, pairs.piece_ids[:, 0].tolist(), batch_size, devices, run, generator)
