"""Tests of batches with runs of pairs of one annotator."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lpc_lightning.data import BatchOrder, ByAnnotator
from lpc_lightning.data.batching.loading import TrainingBatches
from tests.fixtures.ordered_pairs import PairsToOrder

Batches = list[list[list[int]]]


def plan(names: list[str], batch_size: int, devices: int, run: int | None, epoch: int = 0) -> Batches:
    """Return the batches of an epoch for each device."""
    found = []
    for rank in range(devices):
        order = None if run is None else ByAnnotator(run)
        batches = TrainingBatches(PairsToOrder(annotators=names), batch_size, 5, rank, devices, order)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert batches.sizes == [len(batch) for batch in found[-1]], "known beforehand"
        for count in range(len(batches) + 1):
            seen = {pair for batch in found[-1][:count] for pair in batch}
            assert seen <= set(batches.first(count, epoch))
    return found


def steps(epoch: Batches) -> list[list[int]]:
    """Return the pairs of all devices in each step."""
    return [[pair for batch in batches for pair in batch] for batches in zip(*epoch, strict=True)]


some_names = st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=60)


@example(names=["a"], runs=1, run=2, devices=3, epoch=0)
@given(some_names, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_full_runs_are_in_one_batch(names: list[str], runs: int, run: int, devices: int, epoch: int) -> None:
    batch_size = runs * run
    plain, grouped = (plan(names, batch_size, devices, it, epoch) for it in (None, run))
    # Each pair occurs once, except for those that fill the last devices.
    assert {pair for step in steps(grouped) for pair in step} == set(range(len(names)))
    counts = Counter(pair for step in steps(grouped) for pair in step)
    assert counts.total() == math.ceil(len(names) / devices) * devices
    assert max(counts.values()) <= math.ceil(counts.total() / len(names))
    full = math.ceil(len(names) / devices) // batch_size
    among = Counter(names[pair] for step in steps(plain)[:full] for pair in step)
    assert among == Counter(names[pair] for step in steps(grouped)[:full] for pair in step)
    left = [set(range(len(names))) - {p for step in steps(it)[:full] for p in step} for it in (plain, grouped)]
    assert left[0] == left[1], "the short step is plain shuffling's"

    whole: Counter[str] = Counter()
    for batch in [batch for device in grouped for batch in device[:full]]:
        for start in range(0, batch_size, run):
            here = {names[pair] for pair in batch[start : start + run]}
            whole.update(here if len(here) == 1 else ())
    for name in among.keys() - {""}:
        assert whole[name] >= among[name] // run


def test_runs_depend_on_the_epoch() -> None:
    names = ["a", "b", "c", "d"] * 10
    first, again, other = (steps(plan(names, 4, 2, 4, epoch)) for epoch in (1, 1, 2))
    assert first == again
    assert {frozenset(step) for step in first} != {frozenset(step) for step in other}


def test_read_time_is_independent_of_annotator() -> None:
    """As with plain shuffling, a pair is equally likely in each step."""
    names, epochs = ["a"] * 7 + ["b"] * 3 + ["", "c", "d"], 2000
    batches = TrainingBatches(PairsToOrder(annotators=names), 2, 0, order=ByAnnotator(2))
    counts = torch.zeros(len(names), len(batches))
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for step, batch in enumerate(batches):
            counts[batch, step] += 1
    expected = epochs * torch.tensor([2 / 13] * 6 + [1 / 13])
    assert ((counts - expected).abs() / expected.sqrt()).max() < 5


@pytest.mark.parametrize("devices", [1, 2])
def test_batches_hold_pairs_of_same_annotator(devices: int) -> None:
    """Count the pairs of a batch that follow a pair of the same annotator."""
    names = [f"annotator {number % 50}" for number in range(400)]

    def share(order: BatchOrder | None) -> float:
        meeting = 0
        for rank in range(devices):
            for batch in TrainingBatches(PairsToOrder(annotators=names), 8, 0, rank, devices, order):
                meeting += len(batch) - len({names[pair] for pair in batch})
        return meeting / 400

    assert share(None) < 0.1
    # The 8 pairs of an annotator are two runs, so all pairs except two are counted.
    assert share(ByAnnotator(4)) >= 0.75


def test_pairs_per_annotator_below_one() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_order\.pairs_per_annotator: found 0, expected at least 1"):
        ByAnnotator(0)
