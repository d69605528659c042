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
from lpc_lightning.data.tokenization.pieces import PieceTable
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.types import PreferenceBatch

BATCH_TOKENS = 8192
"""Tokens in a batch, and completion tokens to score. Without gradient they take less memory than half as many tokens in
a training step."""
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
    batches = batches_by_length(pairs.pieces, indices)
    # One shape, with about 10 % padding: a pass of seconds is not worth the compilation of more.
    layout = layout.for_batches((pairs.pieces[batch] for batch in batches), most=1)
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


def batches_by_length(pieces: PieceTable, indices: Sequence[int], budget: int | None = None) -> list[list[int]]:
    """Return batches of pairs of similar length, the longest first. If memory is too small, the first batch fails.

    Pairs of one prompt are next to each other. A prompt or a completion that they share is read once. Their completion
    tokens have the same limit, each pair's counted: thousands of pairs may have the same few completions.

    Args:
        pieces: Pieces of every pair of the data set.
        indices: Indices of the pairs to batch.
        budget: Largest number of tokens, and of completion tokens, in a batch. A longer pair is a batch of its own.
            Default: `BATCH_TOKENS`.
    """
    lengths, ids = pieces.lengths.tolist(), pieces.ids.tolist()
    longest: dict[int, int] = {}
    first: dict[int, int] = {}
    for index in indices:
        prompt = ids[index][0]
        longest[prompt] = max(longest.get(prompt, 0), sum(lengths[index]))
        first.setdefault(prompt, index)
    left = left_to_score = 0
    batches: list[list[int]] = []
    read: set[tuple[int, int | None]] = set()
    for index in sorted(indices, key=lambda index: (-longest[ids[index][0]], first[ids[index][0]])):
        prompt, *completions = ids[index]
        own = {(prompt, piece): size for piece, size in zip((None, *completions), lengths[index], strict=True)}
        new, scored = sum(size for piece, size in own.items() if piece not in read), sum(lengths[index][1:])
        if left < new or left_to_score < scored:
            batches.append([])
            left = left_to_score = budget or BATCH_TOKENS
            new, read = sum(own.values()), set()
        batches[-1].append(index)
        left, left_to_score = left - new, left_to_score - scored
        read |= own.keys()
    return batches


def _check_finite(values: Tensor, pairs: TokenStore, indices: Sequence[int], title: str) -> None:
    if (bad_rows := (~values.isfinite()).any(dim=1).nonzero()).numel():
        row = int(bad_rows[0])
        examples = values[row][~values[row].isfinite()][:2].tolist()
        raise FloatingPointError(
            f"{title}: found {examples} for pair {pairs[indices[row]].id!r}, expected finite numbers. Use a wider "
            "trainer.precision or policy.dtype, or other weights."
        )
