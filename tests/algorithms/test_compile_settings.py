"""Tests of the runs that compile a policy on a GPU, and of what they compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lpc_lightning.algorithms import DPO, policy_module
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.policy.memory_efficient_layers import GatedMLP


class LongRun(SyntheticPreferences):
    def micro_batches(self) -> float:
        return policy_module.COMPILED_FROM


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the CPU for a GPU."""
    monkeypatch.setattr(DPO, "_on_gpu", True)
    yield
    torch.use_deterministic_algorithms(False)


def module_of(policy: TinyPolicy, layout: Any = "auto", deterministic: bool = False) -> DPO:
    module = DPO(policy=policy)
    module.trainer = Trainer(deterministic=deterministic, accelerator="cpu", devices=1, logger=False)
    module.trainer.datamodule = LongRun(layout=layout)  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("setting", "deterministic", "compiles"),
    [("auto", False, True), ("auto", True, False), (True, True, True), (False, False, False)],
)
def test_deterministic_run_compiles_on_demand(setting: Any, deterministic: bool, compiles: bool) -> None:
    assert module_of(TinyPolicy(compile=setting), deterministic=deterministic)._should_compile() is compiles


@pytest.mark.parametrize(("strategy", "replays"), [("auto", True), ("ddp", False)])
def test_graphs_need_the_strategy_of_one_device(strategy: str, replays: bool) -> None:
    """DDP on one device has a world of one, too."""
    module = DPO(policy=TinyPolicy(width=32, layers=1, heads=2, compile=False))
    module.configure_model()
    module.trainer = Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
    assert module.trainer.world_size == 1
    assert module._replays(module.policy) is replays


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_padded_rows_keep_lean_layers(layout: str, caplog: pytest.LogCaptureFixture) -> None:
    """Expect compiled layers for packed rows alone. Layers of fewer operations run uncompiled."""
    module = module_of(TinyPolicy(width=32, layers=1, heads=2), layout)
    with caplog.at_level("INFO"):
        module.configure_model()
    policy, padded = module.policy, layout == "padded"
    assert policy.head.compiled
    assert policy.is_compiled is not padded
    assert any(isinstance(part, GatedMLP) for part in policy.modules()) is padded
    assert sum("policy.compile: found rows of one" in text for text in caplog.messages) == padded


def test_teardown_releases_graphs() -> None:
    module = DPO(policy=TinyPolicy(width=32, layers=1, heads=2, compile=False))
    module.configure_model()
    module.policy.compile_layers("eager", few_shapes=True, cuda_graphs=True)
    graphed = module.policy._graphed
    assert graphed is not None
    assert any(each is module.policy.backbone.rotary_emb._buffers for each in graphed._buffers)
    graphed._graphs[1, 8] = None  # a failed capture
    module.teardown("fit")
    assert not graphed._graphs
