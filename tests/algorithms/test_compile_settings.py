"""Tests of the runs that compile a policy on a GPU, and of what they compile."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lpc_lightning.algorithms import DPO, policy_module
from lpc_lightning.policy import TinyPolicy


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the CPU for a GPU, and the run for a long one."""
    long = SimpleNamespace(micro_batches=lambda: policy_module.COMPILED_FROM)
    monkeypatch.setattr(DPO, "_on_gpu", True)
    monkeypatch.setattr(policy_module, "preference_data", lambda trainer: long)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("setting", "deterministic", "compiles"),
    [("auto", False, True), ("auto", True, False), (True, True, True), (False, False, False)],
)
def test_deterministic_run_compiles_on_demand(setting: Any, deterministic: bool, compiles: bool) -> None:
    module = DPO(policy=TinyPolicy(compile=setting))
    module.trainer = Trainer(deterministic=deterministic, accelerator="cpu", devices=1, logger=False)
    assert module._should_compile() is compiles
