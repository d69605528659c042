"""Tests of the key of cached values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from lpc_lightning.policy import CausalPolicy
from lpc_lightning.reference.cached import attention_kernel, computation_key
from tests.fixtures.emulated_device import DEVICE, NAME, Waits

QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture
def policy(tiny: Callable[..., CausalPolicy]) -> CausalPolicy:
    return tiny("llama", width=32, dtype="float32")  # compiled layers skip blocks


def key_on(accelerator: str, policy: CausalPolicy, **settings: Any) -> dict[str, str]:
    return computation_key("w", policy, Trainer(accelerator=accelerator, devices=1, **QUIET, **settings))


def test_key_names_device_kernel_and_versions(policy: CausalPolicy, emulated: Waits) -> None:
    here, there = key_on("cpu", policy), key_on(NAME, policy)
    assert (here["device"], there["device"]) == ("cpu", NAME)
    assert {name for name in here if here[name] != there[name]} == {"device", "attention"}
    assert there["attention"] == "sdpa"
    assert here["torch"] == torch.__version__
    assert here["transformers"] == transformers.__version__


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_key_changes_with_a_version(library: str, policy: CausalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_on("cpu", policy)
    # The import of peft puts another object in the place of the module transformers.
    monkeypatch.setattr(f"lpc_lightning.reference.cached.{library}.__version__", "0.0")
    assert key_on("cpu", policy) != before


def test_key_names_the_kernel_that_runs(policy: CausalPolicy, emulated: Waits) -> None:
    before = key_on(NAME, policy)
    policy.compile_layers(few_shapes=True)
    after = key_on(NAME, policy)
    assert {name for name in before if before[name] != after[name]} == {"attention", "compiled"}
    assert (before["attention"], after["attention"]) == ("sdpa", "flex_attention")


@pytest.mark.parametrize("kernel", ["eager", "flex_attention", "flash_attention_2"])
def test_other_kernels_run_as_set(kernel: str) -> None:
    assert attention_kernel(kernel, torch.device("cpu")) == attention_kernel(kernel, DEVICE) == kernel
