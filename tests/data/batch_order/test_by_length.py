"""Tests of steps with pairs of similar length."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lpc_lightning.data import ByLength
from lpc_lightning.data.batching.loading import TrainingBatches
from tests.fixtures.ordered_pairs import PairsToOrder

Batches = list[list[list[int]]]


def plan(lengths: list[int], batch_size: int, devices: int, window: int | None, epoch: int = 0) -> Batches:
    """Return the batches of an epoch for each device."""
    found, pairs = [], PairsToOrder(lengths)
    order = None if window is None else ByLength(window)
    for rank in range(devices):
        batches = TrainingBatches(pairs, batch_size, 5, rank, devices, order)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(batches) == len(found[-1])
        assert batches.sizes == [len(batch) for batch in found[-1]], "known beforehand"
        for count in range(len(batches) + 1):
            first = TrainingBatches(pairs, batch_size, 5, rank, devices, order).first(count, epoch)
            assert set(found[-1][count - 1] if count else []) <= set(first)
    return found


def steps(epoch: Batches) -> list[list[int]]:
    """Return the pairs of all devices in each step."""
    return [[pair for batch in batches for pair in batch] for batches in zip(*epoch, strict=True)]


some_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=50)
some_windows = st.integers(1, 6)


@example(lengths=[3], batch_size=2, devices=3, window=2, epoch=0)
@given(some_lengths, st.integers(1, 8), st.integers(1, 4), some_windows, st.integers(0, 3))
def test_steps_are_slices_of_sorted_windows(
    lengths: list[int], batch_size: int, devices: int, window: int, epoch: int
) -> None:
    plain, grouped = (steps(plan(lengths, batch_size, devices, it, epoch)) for it in (None, window))
    size = batch_size * devices
    # Each pair occurs once, except for those that fill the last devices.
    assert Counter(pair for step in plain for pair in step) == Counter(pair for step in grouped for pair in step)
    assert {pair for step in grouped for pair in step} == set(range(len(lengths)))
    assert sum(map(len, grouped)) == math.ceil(len(lengths) / devices) * devices
    full = [step for step in plain if len(step) == size]
    expected = []
    for start in range(0, len(full), window):
        ordered = sorted(lengths[pair] for step in full[start : start + window] for pair in step)
        expected += [tuple(ordered[place : place + size]) for place in range(0, len(ordered), size)]
    found = [tuple(sorted(lengths[pair] for pair in step)) for step in grouped[: len(full)]]
    assert sorted(found) == sorted(expected)
    if len(grouped) > len(full):
        assert sorted(grouped[-1]) == sorted(plain[-1]), "the short step is plain shuffling's"


@given(some_lengths, st.integers(1, 8), st.integers(2, 4), some_windows)
def test_step_batches_have_similar_sizes(lengths: list[int], batch_size: int, devices: int, window: int) -> None:
    for batches in zip(*plan(lengths, batch_size, devices, window), strict=True):
        tokens = [sum(lengths[pair] for pair in batch) for batch in batches]
        of_step = [lengths[pair] for batch in batches for pair in batch]
        assert max(tokens) - min(tokens) <= max(of_step) - min(of_step)


def test_steps_depend_on_the_epoch() -> None:
    lengths = list(range(40))
    first, again, other = (steps(plan(lengths, 4, 1, 3, epoch)) for epoch in (1, 1, 2))
    assert first == again
    assert {frozenset(step) for step in first} != {frozenset(step) for step in other}


def test_read_time_is_independent_of_length() -> None:
    """As with plain shuffling, a pair is equally likely in each step."""
    lengths, epochs = [1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 200], 2000
    batches = TrainingBatches(PairsToOrder(lengths), 2, 0, order=ByLength(2))
    counts = torch.zeros(len(lengths), len(batches))
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for step, batch in enumerate(batches):
            counts[batch, step] += 1
    expected = epochs * torch.tensor([2 / 13] * 6 + [1 / 13])
    # The 91 counts have standard deviations of about 16 and 12. The tolerance is five of them.
    assert ((counts - expected).abs() / expected.sqrt()).max() < 5
    means = (counts.T @ torch.tensor(lengths, dtype=torch.float32)) / counts.sum(0)
    assert (means / (sum(lengths) / 13) - 1).abs().max() < 0.1


def test_window_below_one() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_order\.window: found 0, expected at least 1"):
        ByLength(0)
