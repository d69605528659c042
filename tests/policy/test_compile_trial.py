"""Tests of the trial that finds layers which torch cannot compile, and of what a run does then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms import DPO
from lpc_lightning.policy import CausalPolicy, LoRA, TinyPolicy
from lpc_lightning.policy.compile_trial import fault_of_compilation
from tests.fixtures.policies import FAMILIES

Tiny = Callable[..., CausalPolicy]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.compiler.disable
def untraced(states: Tensor) -> Tensor:
    return states.relu()


def break_layers(policy: CausalPolicy) -> None:
    for layer in policy.layers:
        layer.mlp.act_fn.forward = untraced


@pytest.mark.parametrize("family", FAMILIES)
def test_trial_passes_families(family: str, tiny: Tiny) -> None:
    """Build under a device, as a trainer does."""
    attention = "eager" if family == "gemma2" else "auto"
    with torch.device("cpu"):
        policy = tiny(family, attention=attention, width=32, dtype="float32", lora=LoRA(rank=2, dropout=0.1))
        assert fault_of_compilation(policy) is None


def test_trial_changes_nothing(tiny: Tiny) -> None:
    policy = tiny(width=32, dtype="float32", gradient_checkpointing=True)
    before = [(type(part), list(vars(part))) for part in policy.modules()]
    hooks = [len(part._forward_pre_hooks) for part in policy.modules()]
    state = torch.get_rng_state()
    assert fault_of_compilation(policy) is None
    assert [(type(part), list(vars(part))) for part in policy.modules()] == before
    assert [len(part._forward_pre_hooks) for part in policy.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_trial_finds_untraced_code(tiny: Tiny) -> None:
    policy = tiny(width=32, dtype="float32")
    break_layers(policy)
    fault = fault_of_compilation(policy)
    assert fault is not None
    assert "untraced" in fault
    assert "\n" not in fault


class BrokenPolicy(TinyPolicy):
    """A policy whose MLPs torch cannot trace."""

    def build(self, tokenizer: Any = None) -> CausalPolicy:
        policy = super().build(tokenizer)
        break_layers(policy)
        return policy


@pytest.mark.parametrize("setting", ["auto", True])
def test_run_with_untraced_layers(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` trains uncompiled, and `true` compiles without a trial."""
    monkeypatch.setattr(DPO, "_on_gpu", True)
    monkeypatch.setattr(DPO, "_should_compile", lambda self: True)
    module = DPO(policy=BrokenPolicy(width=32, layers=1, heads=2, compile=setting))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        module.configure_model()
    texts = [str(each.message) for each in shown if "policy.compile" in str(each.message)]
    assert not any("\n" in text for text in texts)
    assert (len(texts), module.policy.compiles) == ((1, False) if setting == "auto" else (0, True))
