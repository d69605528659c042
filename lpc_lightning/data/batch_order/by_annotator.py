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


def group_by_annotator(
    order: Sequence[int], annotators: Sequence[str], batch_size: int, devices: int, run: int, generator: Generator
) -> list[int]:
    """Reorder shuffled pairs so that the batches of each device contain runs of pairs of one annotator.

    Args:
        order: Every pair once, in the order of plain shuffling.
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
