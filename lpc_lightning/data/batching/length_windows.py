"""Steps of pairs of like length, so that little of a batch is padding and devices wait little for each other.

As `group_by_length` of transformers (`LengthGroupedSampler`) and the bucketed batches of fairseq do it: the shuffled
pairs are sorted within windows of some steps, and the steps are shuffled again. The expected loss is that of plain
shuffling. A pair falls into each window with the same chance, and from there, whatever its length, into each of the
epoch's steps: so the mean over a step is on average the mean over all pairs, at every place of the epoch. What changes
is which pairs share a step: those of like length, so that steps differ more from one another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator


def group_by_length(
    order: Sequence[int], lengths: Sequence[int], step: int, window: int, generator: Generator
) -> list[int]:
    """Reorder shuffled pairs so that each step holds pairs of like length.

    Args:
        order: Pairs in the order in which plain shuffling would take them.
        lengths: Tokens of every pair.
        step: Pairs in a step, on all devices.
        window: Steps in a window.
        generator: Shuffles the steps.

    Returns:
        The same pairs, the shortest of each step first. Pairs that do not fill a step are those that plain shuffling
        would have in its last one, and stay behind.
    """
    full = len(order) // step * step
    sorted_windows = [
        pair
        for start in range(0, full, window * step)
        for pair in sorted(order[start : min(start + window * step, full)], key=lambda pair: lengths[pair])
    ]
    steps = torch.randperm(full // step, generator=generator).tolist()
    grouped = [pair for number in steps for pair in sorted_windows[number * step : (number + 1) * step]]
    return grouped + sorted(order[full:], key=lambda pair: lengths[pair])
