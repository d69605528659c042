"""A pass over pairs without gradient, in large batches, longest pairs first, divided among the devices."""

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
"""Tokens in a batch. Without gradient they take less memory than half as many tokens in a training step."""
ROUNDS = 32
"""Batches per device after which values are yielded, so that they can be stored."""

PairFunction = Callable[[PreferenceBatch], Tensor]
"""Function from a batch to (B, m) values of its pairs."""


def compute_over_pairs(
    pairs: TokenStore, indices: Sequence[int], layout: Layout, function: PairFunction, trainer: Any, title: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Compute a function of pairs in the trainer's precision and on all its devices.

    All devices run the same number of batches, as a sharded policy needs. A device without a batch of its own repeats
    the last one and discards the result.

    Args:
        pairs: The data set.
        indices: Indices of the pairs, the same on every device.
        layout: Function from pairs to a batch.
        function: Function to compute, for example the log-probabilities of both answers.
        trainer: Trainer whose devices, precision and progress bar are used.
        title: Text before the progress bar.

    Yields:
        (n,) indices and (n, m) values of some of the pairs, the same on every device.

    Raises:
        FloatingPointError: A value is not finite.
    """
    devices, rank, device = trainer.world_size, trainer.global_rank, trainer.strategy.root_device
    batches = batches_by_length(pairs.lengths, indices)
    piece_lengths = pairs.piece_lengths
    # One shape, with about 10 % padding: a pass of seconds is not worth the compilation of more.
    layout = layout.for_batches((piece_lengths[batch] for batch in batches), most=1)
    silent = trainer.progress_bar_callback is None or not trainer.is_global_zero
    with tqdm(total=len(indices), desc=title, unit=" pairs", disable=silent) as bar:
        for start in range(0, len(batches), ROUNDS * devices):
            group = batches[start : start + ROUNDS * devices]
            ends = list(accumulate(map(len, group), initial=0))
            values = torch.zeros(0)
            for first in range(0, len(group), devices):
                number = first + rank
                batch = group[min(number, len(group) - 1)]
                with trainer.precision_plugin.forward_context():
                    part = function(layout([pairs[index] for index in batch]).to(device))
                if not len(values):
                    values = part.new_zeros(ends[-1], part.shape[1])
                if number < len(group):
                    values[ends[number] : ends[number + 1]] = part
                bar.update(ends[min(first + devices, len(group))] - ends[first])
            values = trainer.strategy.reduce(values, reduce_op="sum")
            computed = [index for batch in group for index in batch]
            _check_finite(values, pairs, computed, title)
            yield np.array(computed), values.cpu().numpy()


def batches_by_length(lengths: Sequence[int], indices: Sequence[int], budget: int | None = None) -> list[list[int]]:
    """Return batches of pairs of similar length, the longest first. If memory is too small, the first batch fails.

    Args:
        lengths: Number of tokens of every pair of the data set.
        indices: Indices of the pairs to batch.
        budget: Largest number of tokens in a batch. A longer pair is a batch of its own. Default: `BATCH_TOKENS`.
    """
    left = 0
    batches: list[list[int]] = []
    for index in sorted(indices, key=lambda index: -lengths[index]):
        if left < lengths[index]:
            batches.append([])
            left = budget or BATCH_TOKENS
        batches[-1].append(index)
        left -= lengths[index]
    return batches


def _check_finite(values: Tensor, pairs: TokenStore, indices: Sequence[int], title: str) -> None:
    if (bad_rows := (~values.isfinite()).any(dim=1).nonzero()).numel():
        row = int(bad_rows[0])
        examples = values[row][~values[row].isfinite()][:2].tolist()
        raise FloatingPointError(
            f"{title}: found {examples} for pair {pairs[indices[row]].id!r}, expected finite numbers. Use a wider "
            "trainer.precision or policy.dtype, or other weights."
        )
