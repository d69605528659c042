"""Tests of balanced batches: every pair once, equally full batches, random order within a window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpc_lightning.data import Balanced, DataError
from lpc_lightning.data.batch_order.balanced import WINDOW, balance_batches
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.data.batching.loading import TrainingBatches, TrainingLoader
from lpc_lightning.types import TokenizedPair
from tests.fixtures.ordered_pairs import PairsToOrder


def lengths_of(pairs: int) -> np.ndarray:
    return np.random.default_rng(0).gamma(2.0, 60.0, (pairs, 3)).astype(int) + 1


@pytest.mark.parametrize(("pairs", "devices"), [(1000, 1), (1003, 1), (1002, 2)])
def test_balanced_pairs_come_once(pairs: int, devices: int) -> None:
    order = torch.randperm(pairs).tolist()
    found = balance_batches(order, lengths_of(pairs), 8, devices, torch.Generator().manual_seed(0))
    assert sorted(found) == list(range(pairs))
    step = 8 * devices
    for start in range(0, pairs // step * step, WINDOW * step):  # no pair leaves its window
        window = slice(start, min(start + WINDOW * step, pairs // step * step))
        assert sorted(found[window]) == sorted(order[window])


@pytest.mark.parametrize("devices", [1, 2])
def test_balanced_batches_are_equally_full(devices: int) -> None:
    lengths = lengths_of(1024)
    plain, balanced = (
        [TrainingBatches(PairsToOrder(lengths), 8, 0, rank, devices, order) for rank in range(devices)]
        for order in (None, Balanced())
    )

    def deviation(plans: list[TrainingBatches], part: slice) -> float:
        sums = [lengths[batch][:, part].sum() for plan in plans for batch in plan]
        return float(np.std(sums) / np.mean(sums))

    for part in (slice(0, 3), slice(1, 3)):  # tokens, and answer tokens
        assert deviation(plain, part) > 0.1
        assert deviation(balanced, part) < 0.03


def test_balanced_order_follows_the_epoch() -> None:
    plan = TrainingBatches(PairsToOrder(lengths_of(100)), 4, 7, order=Balanced())
    first = list(plan)
    assert list(plan) == first
    assert [pair for batch in plan.all_devices(0) for pair in batch] == [pair for batch in first for pair in batch]
    assert set(plan.first(3, 0)) == {pair for batch in first[:3] for pair in batch}
    plan.set_epoch(1)
    assert list(plan) != first


def test_resume_refuses_another_order() -> None:
    pairs = [TokenizedPair(str(n), [1], [2], [3]) for n in range(8)]
    loaders = [
        TrainingLoader(pairs, TrainingBatches(PairsToOrder(lengths_of(8)), 4, 0, order=order), PaddedLayout(0))
        for order in (None, Balanced())
    ]
    with pytest.raises(DataError, match=r"'batch_order': 'Balanced\(\)'.*data\.batch_order"):
        loaders[1].load_state_dict(loaders[0].state_dict())
