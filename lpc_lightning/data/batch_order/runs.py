"""Batches filled with runs of pairs that belong together, such as those of one annotator.

The shuffled pairs of each group are split into runs, and batches are filled with runs. Every pair is still used once in
an epoch, and a full batch is equally likely in each step of the epoch. Only the pairs that share a batch change.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain

import torch
from torch import Generator


def place_together(
    order: Sequence[int],
    groups: Sequence[Hashable],
    batch_size: int,
    devices: int,
    run: int,
    generator: Generator,
    places: Sequence[int] | None = None,
) -> list[int]:
    """Reorder shuffled pairs so that the batches of each device contain runs of pairs of one group.

    Args:
        order: Pairs in the order of plain shuffling.
        groups: Group of each pair. A pair without a group (`""`) is a run of its own.
        batch_size: Number of pairs in a batch of one device.
        devices: Number of devices n. Each device takes every n-th pair.
        run: Number of pairs in a run. The last run of a group may be shorter. If `run` divides the batch size, no full
            run is split.
        generator: Random generator that shuffles runs and batches.
        places: Place of each pair in an order that runs follow: a run has neighbours in it, and so do the runs of a
            batch. None: random runs.

    Returns:
        The same pairs. The pairs at the end that do not fill a step keep their order.
    """
    full = len(order) // (batch_size * devices) * batch_size * devices
    members: dict[Hashable, list[int]] = {}
    for pair in order[:full]:
        members.setdefault(groups[pair], []).append(pair)
    if places is not None:
        members = {group: sorted(pairs, key=places.__getitem__) for group, pairs in members.items()}
    runs = [[pair] for pair in members.pop("", [])]
    runs += [pairs[start : start + run] for pairs in members.values() for start in range(0, len(pairs), run)]
    mixed = _shuffled(runs, generator)
    if places is not None:
        mixed.sort(key=lambda pairs: sum(places[pair] for pair in pairs) / len(pairs))
    # Full runs are first and fill whole batches. Shorter runs follow, sorted by size.
    mixed.sort(key=len, reverse=True)
    pairs = list(chain.from_iterable(mixed))
    batches = _shuffled([pairs[start : start + batch_size] for start in range(0, full, batch_size)], generator)
    steps = [batches[start : start + devices] for start in range(0, len(batches), devices)]
    dealt = [pair for step in steps for pair in chain.from_iterable(zip(*step, strict=True))]
    return [*dealt, *order[full:]]


def _shuffled(values: Sequence[list[int]], generator: Generator) -> list[list[int]]:
    return [values[number] for number in torch.randperm(len(values), generator=generator).tolist()]
