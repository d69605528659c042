"""Tests of the batches of each device and of the loader's state."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lpc_lightning.data import BatchOrder, ByAnnotator, ByLength, DataError
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.data.batching.loading import EvaluationBatches, PreferenceLoader, TrainingBatches, TrainingLoader
from lpc_lightning.types import TokenizedPair
from tests.fixtures.ordered_pairs import PairsToOrder

sizes = st.integers(1, 40)
devices = st.integers(1, 9)
MakePairs = Callable[..., list[TokenizedPair]]


def training(pairs: int, batch_size: int, devices: int, seed: int = 0, epoch: int = 0) -> list[list[list[int]]]:
    """Return the batches of an epoch for each device."""
    found = []
    for rank in range(devices):
        batches = TrainingBatches(range(pairs), batch_size, seed, rank, devices)
        batches.set_epoch(epoch)
        found.append(list(batches))
        assert len(batches) == len(found[-1])
        assert batches.sizes == [len(batch) for batch in found[-1]]
    return found


@example(pairs=1, batch_size=1, devices=3)
@given(pairs=sizes, batch_size=sizes, devices=devices)
def test_training_batches_use_every_pair_equally(pairs: int, batch_size: int, devices: int) -> None:
    epoch = training(pairs, batch_size, devices)
    taken = sorted(pair for batches in epoch for batch in batches for pair in batch)
    share = math.ceil(pairs / devices)
    expected = [min(batch_size, share - start) for start in range(0, share, batch_size)]
    assert set(taken) == set(range(pairs))
    assert len(taken) == share * devices  # less than one pair a device comes twice
    assert all([len(batch) for batch in batches] == expected for batches in epoch)


@given(pairs=st.integers(12, 40), batch_size=sizes, devices=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_training_order_depends_on_seed_and_epoch(pairs: int, batch_size: int, devices: int, seed: int) -> None:
    def order(**place: int) -> list[list[list[int]]]:
        return training(pairs, batch_size, devices, **place)

    torch.manual_seed(5)
    first = order(seed=seed)
    torch.manual_seed(6)
    assert order(seed=seed) == first
    # There are 12! orders, so two of them are equal with probability 1 in 480 million.
    assert order(seed=seed, epoch=1) != first
    assert order(seed=seed + 1) != first


def test_training_order_is_independent_of_devices() -> None:
    (alone,) = training(12, 12, 1)[0]
    for devices in (2, 3, 4, 6):
        shares = [batches[0] for batches in training(12, 12, devices)]
        assert [pair for row in zip(*shares, strict=True) for pair in row] == alone


@example(pairs=3, batch_size=1, devices=2)
@given(pairs=sizes, batch_size=sizes, devices=devices)
def test_evaluation_batches_use_every_pair_once(pairs: int, batch_size: int, devices: int) -> None:
    if pairs < devices:
        with pytest.raises(DataError, match=f"found {pairs} pairs for {devices} devices"):
            EvaluationBatches(range(pairs), batch_size, 0, devices)
        return
    plans = [EvaluationBatches(range(pairs), batch_size, rank, devices) for rank in range(devices)]
    taken = [pair for plan in plans for batch in plan for pair in batch]
    assert sorted(taken) == list(range(pairs))
    assert len({len(plan) for plan in plans}) == 1
    for plan in plans:
        counts = [len(batch) for batch in plan]
        assert len(plan) == len(counts)
        assert min(counts) >= 1
        assert max(counts) - min(counts) <= 1
        # One more if a device has one pair more than the others and the batch size is 1.
        assert max(counts) <= batch_size + (batch_size == 1 and pairs % devices > 0)
        assert sorted(order := [pair for batch in plan for pair in batch]) == order


@pytest.fixture
def pairs(make_pairs: MakePairs) -> list[TokenizedPair]:
    return make_pairs([(3, 2, 4)] * 11)


def loader(
    pairs: list[TokenizedPair],
    seed: int = 0,
    batch_size: int = 2,
    order: BatchOrder | None = None,
    repeats: bool = False,
    **options: Any,
) -> TrainingLoader:
    # The lengths are unordered, and some are equal.
    lengths = [(7 * number) % 5 for number in range(len(pairs))]
    names = [f"annotator {number % 3}" for number in range(len(pairs))]
    batches = TrainingBatches(PairsToOrder(lengths, names), batch_size, seed, order=order, repeats=repeats)
    return TrainingLoader(pairs, batches, PaddedLayout(0), **options)


def ids(loader: PreferenceLoader, epoch: int = 0) -> list[tuple[str, ...]]:
    if isinstance(loader, TrainingLoader):
        loader.sampler.set_epoch(epoch)
    return [batch.ids for batch in loader]


@pytest.mark.slow
@pytest.mark.parametrize("order", [None, ByLength(2), ByAnnotator(2)], ids=["plain", "by length", "by annotator"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 4, 6])
def test_resume_within_epoch_takes_next_batch(
    pairs: list[TokenizedPair], order: BatchOrder | None, num_workers: int, taken: int
) -> None:
    whole, next_epoch = (ids(loader(pairs, order=order), epoch=epoch) for epoch in (3, 4))
    stopped = loader(pairs, num_workers=num_workers, order=order)
    stopped.sampler.set_epoch(3)
    batches = iter(stopped)
    assert [next(batches).ids for _ in range(taken)] == whole[:taken]

    resumed = loader(pairs, num_workers=num_workers, order=order)
    resumed.load_state_dict(stopped.state_dict())
    assert len(resumed) == 6
    assert ids(resumed, epoch=3) == whole[taken:]
    assert resumed.state_dict()["taken"] == 6
    assert ids(resumed, epoch=4) == next_epoch


def test_resume_between_epochs_takes_whole_epoch(pairs: list[TokenizedPair]) -> None:
    stopped = loader(pairs)
    ids(stopped, epoch=0)
    resumed = loader(pairs)
    resumed.load_state_dict(stopped.state_dict())
    assert ids(resumed, epoch=1) == ids(loader(pairs), epoch=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "'seed': 1"),
        ({"batch_size": 3}, "'batch_size': 3"),
        ({"repeats": True}, "'repeats': True"),
        ({"order": ByLength(4)}, r"'batch_order': 'ByLength\(window=4\)'"),
        ({"order": ByAnnotator(2)}, r"'batch_order': 'ByAnnotator\(pairs_per_annotator=2, shared_prompts=False\)'"),
        ({"pairs": 10}, "'pairs': 10"),
    ],
)
def test_resume_refuses_another_order(pairs: list[TokenizedPair], change: dict[str, Any], message: str) -> None:
    state = loader(pairs).state_dict()
    other = loader(pairs[: change.pop("pairs", None)], **change)
    with pytest.raises(
        DataError, match=rf"resume: found data order .*{message}.*, expected .* as in the checkpoint\. .*"
    ):
        other.load_state_dict(state)


def test_resume_refuses_other_pairs(
    tmp_path: Path, write_rows: Callable[..., Path], tokenizers: dict[str, Any]
) -> None:
    from lpc_lightning.data.sources.example_source import RowSource
    from lpc_lightning.data.tokenization.lengths import LengthPolicy
    from lpc_lightning.data.tokenization.templates import make_template
    from lpc_lightning.data.tokenization.token_cache import load_or_tokenize

    def stored(answer: str) -> Any:
        rows = [{"prompt": f"hello {n}", "chosen": answer, "rejected": "no"} for n in range(3)]
        source = RowSource(str(write_rows(rows, f"{answer}.jsonl")))
        return load_or_tokenize(source, make_template(tokenizers["chatml"]), LengthPolicy(), cache_dir=tmp_path)[0]

    state = loader(stored("yes")).state_dict()
    loader(stored("yes")).load_state_dict(state)
    with pytest.raises(DataError, match="found data order"):
        loader(stored("well")).load_state_dict(state)
