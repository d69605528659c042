"""Tests of refused references, and of a cache that cannot be written."""

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


def test_changed_published_weights_are_refused(small_policy: Any, own_data: Any, fit_run: Any) -> None:
    spec = small_policy()
    module = DPO(policy=spec)
    fit_run(module, own_data(), max_steps=1)
    spec.seed = 5
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    with pytest.raises(ConfigError, match="policy: found other weights than those that this module was built from"):
        trainer.test(module, datamodule=own_data(), verbose=False)


def test_cached_reference_refuses_other_data(
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
        module.score_batch(PaddedLayout(0)(make_pairs([(3, 4, 5), (2, 2, 2)])))


def test_unknown_reference_is_refused(small_policy: Any) -> None:
    with pytest.raises(ConfigError, match=r"model\.reference: found 'frozen', expected cached or live\."):
        DPO(policy=small_policy(), reference="frozen")


class Nan(Callback):
    """Sets weights of the published policy to NaN."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        build = pl_module.policy_spec.build

        def broken(*args: Any) -> Any:
            policy = build(*args)
            next(policy.parameters()).data[5:] = torch.nan
            return policy

        pl_module.policy_spec.build = broken


def test_nan_values_are_refused_and_not_stored(small_policy: Any, own_data: Any, fit_run: Any, entries: Any) -> None:
    with pytest.raises(
        FloatingPointError, match=r"reference, train pairs: found \[nan, nan\] for pair '.*', expected fi"
    ):
        fit_run(DPO(policy=small_policy()), own_data(), max_steps=1, callbacks=[Nan()])
    assert entries() == []


def test_run_continues_without_writable_cache(
    small_policy: Any, own_data: Any, fit_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PairCache, "add", full)
    with pytest.warns(UserWarning, match="cannot be stored in .*No space left on device.* This run continues without"):
        cached = fit_run(DPO(policy=small_policy()), own_data(), max_epochs=1)
    live = fit_run(DPO(policy=small_policy(), reference="live"), own_data(), max_epochs=1)
    assert cached.losses == pytest.approx(live.losses, rel=1e-5)
