"""Tests of which policy computes cached values if the module was used before, and of the key of these values."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lpc_lightning.algorithms import DPO
from lpc_lightning.latent import MarginalSpace
from lpc_lightning.policy import CausalPolicy, TinyPolicy
from lpc_lightning.reference import cached

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


class Recorded(TinyPolicy):
    """Keeps the policies that are built from it, and those that compute."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(width=16, layers=1, heads=2, **settings)
        self.built: list[CausalPolicy] = []
        self.computed: list[CausalPolicy] = []

    def build(self, *args: Any) -> CausalPolicy:
        policy = super().build(*args)
        self.built.append(policy)
        policy.register_forward_pre_hook(lambda module, _: self.computed.append(module))
        return policy


@pytest.fixture(autouse=True)
def uncompiled_programs() -> Iterator[None]:
    """Run compiled layers without the compiler, which takes a minute."""
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        yield
    torch._dynamo.reset()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Keys of the values that are read or computed."""
    found: list[dict[str, str]] = []
    key_of = cached.computation_key

    def recorded(*args: Any) -> dict[str, str]:
        found.append(key_of(*args))
        return found[-1]

    monkeypatch.setattr(cached, "computation_key", recorded)
    return found


def module_of(spec: TinyPolicy) -> DPO:
    return DPO(policy=spec, optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-2))


def test_first_fit_with_an_average_builds_one_model(own_data: Any, fit_run: Any, keys: Any) -> None:
    spec = Recorded(compile=True)
    run = fit_run(module_of(spec), own_data(), callbacks=[EMAWeightAveraging()], max_steps=1)
    assert spec.built == [run.module.policy]
    assert set(spec.computed) == {run.module.policy}
    assert {key["compiled"] for key in keys} == {str(run.module.policy.is_compiled)} == {"True"}


def test_validated_policy_is_not_built_again(own_data: Any, fit_run: Any, tmp_path: Path) -> None:
    spec = Recorded()
    module = module_of(spec)
    Trainer(**QUIET).validate(module, datamodule=own_data(), verbose=False)
    shutil.rmtree(tmp_path / "reference")
    fit_run(module, own_data(), max_steps=1)
    assert spec.built == [module.policy]


def test_frozen_policy_is_not_built_again(own_data: Any, fit_run: Any) -> None:
    """Its weights are the published ones after a fit, in the type of the trainer."""
    spec = Recorded(trainable=False)
    module = DPO(policy=spec, latent=MarginalSpace(num_codes=4, hidden=8))
    fit_run(module, own_data(), max_steps=1, precision="64-true")
    Trainer(**QUIET, precision="64-true").test(module, datamodule=own_data(), verbose=False)
    assert spec.built == [module.policy]


@pytest.mark.parametrize("change", ["training", "by hand"])
def test_changed_policy_is_built_again_as_compiled(change: str, own_data: Any, fit_run: Any, keys: Any) -> None:
    spec = Recorded(compile=True)
    module = module_of(spec)
    if change == "training":
        fit_run(module, own_data(), max_steps=3)
    else:
        module.configure_model()
        next(module.policy.parameters()).data += 1.0
    spec.computed.clear()
    keys.clear()
    Trainer(**QUIET).test(module, datamodule=own_data(), verbose=False)
    assert len(spec.built) == 2
    assert spec.computed[0] is spec.built[1]
    assert {policy.is_compiled for policy in spec.computed} == {True}
    assert {key["compiled"] for key in keys} == {"True"}
