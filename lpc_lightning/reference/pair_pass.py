"""Pass over pairs without gradient: large batches, longest pairs first, divided among the devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lpc_lightning.data import Layout
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.types import PreferenceBatch

BATCH_TOKENS = 8192
"""Tokens in a batch. Without gradient they take less memory than half as many in a training step."""
ROUNDS = 32
"""Batches of each device after which values are yielded, so that they can be stored."""

Ask = Callable[[PreferenceBatch], Tensor]
"""Function from a batch to (B, m) values of its pairs."""


def ask_of_pairs(
    pairs: TokenStore, places: Sequence[int], layout: Layout, ask: Ask, trainer: Any, title: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ask something of some pairs of a data set, in the trainer's precision and on all its devices.

    All devices take equally many batches, as a sharded policy needs: where there are none left for some, these repeat
    the last one for nothing.

    Args:
        pairs: The data set.
        places: Which of its pairs; the same on every device.
        layout: Lays batches out.
        ask: What is asked, such as log-probabilities of both answers.
        trainer: Whose devices, precision and progress bar are taken.
        title: What stands before the bar.

    Yields:
        (n,) places and (n, m) numbers, the same on every device.

    Raises:
        FloatingPointError: One of them is not finite.
    """
    devices, rank, device = trainer.world_size, trainer.global_rank, trainer.strategy.root_device
    batches = batches_by_length(pairs.lengths, places)
    piece_lengths = pairs.piece_lengths
    layout = layout.for_batches(piece_lengths[batch] for batch in batches)
    silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
    with tqdm(total=len(places), desc=title, unit=" pairs", disable=silent) as bar:
        for start in range(0, len(batches), ROUNDS * devices):
            several = batches[start : start + ROUNDS * devices]
            ends = list(accumulate(map(len, several), initial=0))
            found = torch.zeros(0)
            for first in range(0, len(several), devices):
                number = first + rank
                batch = several[min(number, len(several) - 1)]
                with trainer.precision_plugin.forward_context():
                    values = ask(layout([pairs[place] for place in batch]).to(device))
                if not len(found):
                    found = values.new_zeros(ends[-1], values.shape[1])
                if number < len(several):
                    found[ends[number] : ends[number + 1]] = values
                bar.update(ends[min(first + devices, len(several))] - ends[first])
            found = trainer.strategy.reduce(found, reduce_op="sum")
            scored = [place for batch in several for place in batch]
            _check_finite(found, pairs, scored, title)
            yield np.array(scored), found.cpu().numpy()


def batches_by_length(lengths: Sequence[int], places: Sequence[int], budget: int | None = None) -> list[list[int]]:
    """Batches of pairs of like length, the longest first, so that what does not fit into memory fails at once.

    Args:
        lengths: Tokens of every pair of the data set.
        places: The pairs to batch.
        budget: Most tokens of a batch, but for a single pair that is longer. Default: `BATCH_TOKENS`.
    """
    left = 0
    batches: list[list[int]] = []
    for place in sorted(places, key=lambda place: -lengths[place]):
        if left < lengths[place]:
            batches.append([])
            left = budget or BATCH_TOKENS
        batches[-1].append(place)
        left -= lengths[place]
    return batches


def _check_finite(found: Tensor, pairs: TokenStore, places: Sequence[int], title: str) -> None:
    if (bad := (~found.isfinite()).any(dim=1).nonzero()).numel():
        place = int(bad[0])
        values = found[place][~found[place].isfinite()][:2].tolist()
        raise FloatingPointError(
            f"{title}: found {values} for pair {pairs[places[place]].id!r}, expected finite numbers. Take a wider "
            "trainer.precision or policy.dtype, or other weights."
        )
