"""Tests of batches with runs of pairs of one annotator."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lpc_lightning.data import BatchOrder, ByAnnotator
from lpc_lightning.data.batch_order.by_annotator import prompt_places
from lpc_lightning.data.batching.loading import TrainingBatches
from tests.fixtures.ordered_pairs import PairsToOrder

Batches = list[list[list[int]]]


def plan(
    names: list[str],
    batch_size: int,
    devices: int,
    run: int | None,
    epoch: int = 0,
    prompts: list[int] | None = None,
) -> Batches:
    """Return the batches of an epoch for each device. With prompts, batches share them."""
    found = []
    for rank in range(devices):
        order = None if run is None else ByAnnotator(run, shared_prompts=prompts is not None)
        pairs = PairsToOrder(annotators=names, prompts=prompts or ())
        batches = TrainingBatches(pairs, batch_size, 5, rank, devices, order)
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


@example(names=["a"], runs=1, run=2, devices=3, epoch=0, prompts=None)
@given(
    some_names,
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 2),
    st.none() | st.lists(st.integers(0, 9), min_size=60, max_size=60),
)
def test_full_runs_are_in_one_batch(
    names: list[str], runs: int, run: int, devices: int, epoch: int, prompts: list[int] | None
) -> None:
    batch_size = runs * run
    given_prompts = None if prompts is None else prompts[: len(names)]
    plain, grouped = (plan(names, batch_size, devices, it, epoch, given_prompts) for it in (None, run))
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


@pytest.mark.parametrize("shared_prompts", [False, True])
def test_read_time_is_independent_of_annotator(shared_prompts: bool) -> None:
    """As with plain shuffling, a pair is equally likely in each step."""
    names, epochs = ["a"] * 7 + ["b"] * 3 + ["", "c", "d"], 2000
    pairs = PairsToOrder(annotators=names, prompts=[1, 2, 3, 4, 5, 6, 7, 1, 2, 8, 9, 9, 8])
    batches = TrainingBatches(pairs, 2, 0, order=ByAnnotator(2, shared_prompts))
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


def test_places_keep_connected_prompts_together() -> None:
    """In 200 drawn data sets, the parts are those of a search by hand. Every prompt has one place."""
    random = np.random.default_rng(0)
    for seed in range(200):
        count = int(random.integers(1, 30))
        names = [str(name) for name in random.choice(["", "a", "b", "c", "d", "e"], count)]
        prompts = random.integers(0, 12, count).tolist()
        places = prompt_places(PairsToOrder(annotators=names, prompts=prompts), torch.Generator().manual_seed(seed))
        place_of = dict(zip(prompts, places, strict=True))
        assert [place_of[prompt] for prompt in prompts] == places
        assert sorted(place_of.values()) == list(range(len(place_of)))
        left = set(prompts)
        while left:
            part = {left.pop()}
            while (
                grown := {
                    prompt
                    for prompt, name in zip(prompts, names, strict=True)
                    if name and name in {n for p, n in zip(prompts, names, strict=True) if p in part}
                }
                - part
            ):
                part |= grown
            left -= part
            own = sorted(place_of[prompt] for prompt in part)
            assert own == list(range(own[0], own[0] + len(own)))


def test_places_depend_on_the_generator() -> None:
    pairs = PairsToOrder(annotators=["a"] * 20, prompts=range(20))
    first, again, other = (prompt_places(pairs, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("devices", [1, 2])
def test_batches_of_a_conversation_share_prompts(devices: int) -> None:
    """Five conversations of 20 statements, each with 15 people who vote on 16 of them."""
    random = np.random.default_rng(0)
    votes = [
        (f"person {talk}/{person}", 20 * talk + int(statement))
        for talk in range(5)
        for person in range(15)
        for statement in random.permutation(20)[:16]
    ]
    names, prompts = map(list, zip(*votes, strict=True))

    def prompts_per_pair(prompts_are_shared: bool) -> float:
        epoch = plan(names, 32, devices, 8, prompts=prompts if prompts_are_shared else None)
        assert sorted(pair for step in steps(epoch) for pair in step) == list(range(len(votes)))
        return sum(len({prompts[pair] for pair in batch}) for batches in epoch for batch in batches) / len(votes)

    # At best, 32 votes of four people are on 8 statements.
    assert prompts_per_pair(False) > 0.85
    assert prompts_per_pair(True) < 0.45


def test_pairs_per_annotator_below_one() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_order\.pairs_per_annotator: found 0, expected at least 1"):
        ByAnnotator(0)
