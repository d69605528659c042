"""Tests of the deferred checks of training losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lpc_lightning.algorithms import DPO
from lpc_lightning.algorithms.metrics import MAX_UNREAD, RecentLosses, fetch
from lpc_lightning.types import PairLogps, PairLosses


def watched(*values: float) -> RecentLosses:
    losses = RecentLosses()
    for number, value in enumerate(values):
        losses.add(torch.tensor(value), step=number // 2, epoch=0, batch=number, ids=(f"a{number}", f"b{number}"))
    return losses


def test_check_names_the_first_loss() -> None:
    losses = watched(0.5, 0.25, float("inf"), float("nan"))
    expected = r"train/loss: found inf at step 1 \(epoch 0, batch 2, pairs a2, b2\)"
    for _ in range(2):  # a later check, before a checkpoint is written, fails again
        with pytest.raises(FloatingPointError, match=expected):
            losses.check()


def test_check_uses_given_values() -> None:
    losses = watched(0.5, float("nan"))
    assert list(losses.unread()) == ["unread/0", "unread/1"]
    losses.check({name: torch.tensor(0.0) for name in losses.unread()})
    assert losses.unread() == {}
    losses.check()


def test_add_checks_when_list_is_full() -> None:
    losses = watched(*[0.5] * (MAX_UNREAD - 1))
    with pytest.raises(FloatingPointError):
        losses.add(torch.tensor(float("nan")), 0, 0, 0, ("a",))


def test_fetch_keeps_names_order_and_digits() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    result = fetch({"b": third, "a": 0.1, "c": torch.tensor(2)})
    assert list(result) == ["b", "a", "c"]
    assert [float(value) for value in result.values()] == [1 / 3, 0.1, 2.0]
    assert fetch({}) == {}


class Diverging(DPO):
    """DPO whose loss is NaN from the third micro-batch on."""

    steps = 0

    def preference_loss(self, logps: PairLogps) -> PairLosses:
        result = super().preference_loss(logps)
        self.steps += self.training and logps.policy_chosen.requires_grad
        return result if self.steps < 3 else PairLosses(result.losses * torch.nan, *[result.chosen_rewards] * 2)


@pytest.mark.parametrize("every", [1, 7])
def test_no_checkpoint_after_nan_loss(
    every: int, fit_run: Callable[..., Any], small_policy: Callable[..., Any], tmp_path: Path
) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(FloatingPointError, match=r"found nan at step 2 \(epoch 0, batch 2, pairs "):
        fit_run(Diverging(policy=small_policy()), callbacks=[saved], max_steps=6, log_every_n_steps=every)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]
