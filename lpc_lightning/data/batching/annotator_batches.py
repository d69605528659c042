"""Batches in which pairs of one annotator stand together, so that they can share what they say about the codes.

Shuffled batches of 8 pairs by hundreds of annotators hardly hold two of the same one. Here the shuffled pairs of each
annotator are cut into runs, and batches are filled with runs. Every pair still comes once an epoch, and a full batch
into each of the epoch's steps with the same chance; what changes is which pairs share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Generator


def group_by_annotator(
    order: Sequence[int], annotators: Sequence[str], batch_size: int, devices: int, run: int, generator: Generator
) -> list[int]:
    """Reorder shuffled pairs so that the batches of each device hold runs of pairs of one annotator.

    Args:
        order: Every pair once, in the order in which plain shuffling would take them.
        annotators: Who labelled each pair; a pair of nobody (`""`) is a run of its own.
        batch_size: Pairs in a batch of one device.
        devices: Devices, which take every n-th pair.
        run: Pairs in a run; an annotator's last one may hold fewer. A divisor of the batch size cuts no full run.
        generator: Shuffles runs and batches.

    Returns:
        The same pairs. Those that do not fill a step are those that plain shuffling would have in its last one, and
        stay behind as they are.
    """
    full = len(order) // (batch_size * devices) * batch_size * devices
    of: dict[str, list[int]] = {}
    for pair in order[:full]:
        of.setdefault(annotators[pair], []).append(pair)
    runs = [[pair] for pair in of.pop("", [])]
    runs += [pairs[start : start + run] for pairs in of.values() for start in range(0, len(pairs), run)]
    # Full runs first, which fill batches without a rest; then shorter ones, by their size.
    mixed = sorted(_shuffled(runs, generator), key=len, reverse=True)
    pairs = list(chain.from_iterable(mixed))
    batches = _shuffled([pairs[start : start + batch_size] for start in range(0, full, batch_size)], generator)
    steps = [batches[start : start + devices] for start in range(0, len(batches), devices)]
    dealt = [pair for step in steps for pair in chain.from_iterable(zip(*step, strict=True))]
    return [*dealt, *order[full:]]


def _shuffled(values: Sequence[list[int]], generator: Generator) -> list[list[int]]:
    return [values[number] for number in torch.randperm(len(values), generator=generator).tolist()]
