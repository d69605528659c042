"""Training batches of nearly equal size, so that fixed shapes hold them with little padding.

The shuffled pairs are dealt out anew among the batches of a window: the longest pair first, each to the batch that is
least full. Every pair comes once an epoch, in the window where plain shuffling has it, and the batches of a window come
in random order: the mean over a batch is on average the mean over all pairs. What changes is which pairs share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator

WINDOW = 32
"""Steps whose pairs are dealt out together."""


def balance_batches(
    order: Sequence[int], piece_lengths: np.ndarray, batch_size: int, devices: int, generator: Generator
) -> list[int]:
    """Reorder shuffled pairs so that all batches hold about as many tokens, and as many answer tokens.

    Args:
        order: Pairs in the order in which plain shuffling would take them; device d takes every n-th one from d on.
        piece_lengths: (pairs, 3) tokens of every prompt, chosen and rejected completion.
        batch_size: Pairs in a batch of one device.
        devices: n.
        generator: Shuffles the batches of a window.

    Returns:
        The same pairs. Those that do not fill a step stay behind, as they are.
    """
    step = batch_size * devices
    full = len(order) // step * step
    balanced: list[int] = []
    for start in range(0, full, WINDOW * step):
        window = list(order[start : min(start + WINDOW * step, full)])
        batches = _deal(window, piece_lengths, batch_size)
        shuffled = [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
        for first in range(0, len(shuffled), devices):
            together = zip(*shuffled[first : first + devices], strict=True)
            balanced += [pair for pairs in together for pair in pairs]
    return balanced + list(order[full:])


def _deal(window: Sequence[int], piece_lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Deal pairs out among batches, by tokens and answer tokens, each in units of a batch's mean."""
    lengths = piece_lengths[list(window)]
    sizes = np.stack([lengths.sum(1), lengths[:, 1:].sum(1)], axis=1)
    number = len(window) // batch_size
    sizes = sizes / (sizes.sum(0) / number)
    batches: list[list[int]] = [[] for _ in range(number)]
    fill, room = np.zeros((number, 2)), np.full(number, batch_size)
    for place in np.argsort(-sizes.sum(1), kind="stable"):
        # The batch whose squared fill grows least: |fill + size|^2 - |fill|^2, up to a constant.
        growth = fill @ sizes[place]
        growth[room == 0] = np.inf
        batch = int(growth.argmin())
        batches[batch].append(window[place])
        fill[batch] += sizes[place]
        room[batch] -= 1
    return batches
