"""What cannot be cached is refused, and a cache that fails costs no run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import PaddedLayout
from lpc_lightning.errors import ConfigError
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.types import TokenizedPair


def test_published_weights_that_have_changed_are_told(small_policy: Any, own_data: Any, fit_run: Any) -> None:
    spec = small_policy()
    module = DPO(policy=spec)
    fit_run(module, own_data(), max_steps=1)
    spec.seed = 5
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ConfigError, match="policy: found other weights than those that this module was built from"):
        trainer.test(module, datamodule=own_data(), verbose=False)


def test_other_data_is_refused(
    small_policy: Any, make_pairs: Callable[..., list[TokenizedPair]], make_loader: Any, make_trainer: Any
) -> None:
    loader = make_loader(make_pairs([(3, 4, 5), (2, 2, 2)]))
    with pytest.raises(ConfigError, match=r"model\.reference: found cached with data of NoneType, expected a Prefer"):
        make_trainer(max_steps=1).fit(DPO(policy=small_policy()), loader, loader)


def test_batches_without_values_are_refused(small_policy: Any, make_pairs: Callable[..., list[TokenizedPair]]) -> None:
    module = DPO(policy=small_policy())
    module.configure_model()
    with pytest.raises(
        ConfigError,
        match=r"found cached, and pairs without reference log-probabilities \(the first is 'pair 0'\)\. Expected",
    ):
        module.read(PaddedLayout(0)(make_pairs([(3, 4, 5), (2, 2, 2)])))


def test_no_such_reference(small_policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.reference: found 'frozen', expected cached or live\."):
        DPO(policy=small_policy(), reference="frozen")


class Nan(Callback):
    """Makes a weight of the published policy no number."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        build = pl_module.policy_spec.build

        def broken(*args: Any) -> Any:
            policy = build(*args)
            next(policy.parameters()).data[5:] = torch.nan
            return policy

        pl_module.policy_spec.build = broken


def test_values_that_are_no_numbers_are_told_and_not_kept(
    small_policy: Any, own_data: Any, fit_run: Any, entries: Any
) -> None:
    with pytest.raises(
        FloatingPointError, match=r"reference, train pairs: found \[nan, nan\] for pair '.*', expected fi"
    ):
        fit_run(DPO(policy=small_policy()), own_data(), max_steps=1, callbacks=[Nan()])
    assert entries() == []


def test_a_cache_that_cannot_be_written_costs_no_run(
    small_policy: Any, own_data: Any, fit_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PairCache, "add", full)
    with pytest.warns(UserWarning, match="cannot be kept in .*No space left on device.* This run goes on without"):
        cached = fit_run(DPO(policy=small_policy()), own_data(), max_epochs=1)
    live = fit_run(DPO(policy=small_policy(), reference="live"), own_data(), max_epochs=1)
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)
