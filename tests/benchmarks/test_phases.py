"""The time split of real steps: every second is booked once, under the part that took it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from benchmarks.phases import PARTS
from benchmarks.recorder import StepRecorder
from lpc_lightning.algorithms import DPO
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import TinyPolicy, causal, logprobs

SLOW = 0.1
"""Seconds by which a part is slowed down: far more than all of a tiny step takes."""
LATENTS: dict[str, Callable[[], LatentSpace] | None] = {
    "plain": None,
    "gumbel": lambda: GumbelSpace(num_codes=3, hidden=8),
    "marginal": lambda: MarginalSpace(num_codes=3, hidden=8),
}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StepRecorder]:
    """Three recorded steps of a module, after something was done to it."""
    # What is wrapped for good in a benchmark's process is put back here.
    for owner, name in ((causal.BatchForward, "logps"), (causal.BatchForward, "logps_per_code")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(logprobs._TokenLogps, "backward", staticmethod(logprobs._TokenLogps.backward))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def run(module: DPO, change: Callable[[DPO], None] = lambda module: None) -> StepRecorder:
        seed_everything(0, verbose=False)
        recorder = StepRecorder(str(tmp_path / "recording.json"), split=True)
        data = SyntheticPreferences(train_pairs=6, validation_pairs=0, batch_size=2, cache_dir=str(tmp_path / "cache"))
        module.configure_model()
        change(module)
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
        trainer = Trainer(accelerator="cpu", max_steps=3, callbacks=[recorder], enable_model_summary=False, **quiet)
        trainer.fit(module, datamodule=data)
        return recorder

    return run


def policy() -> TinyPolicy:
    return TinyPolicy(width=16, layers=1, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_a_part_that_is_slow_is_the_one_that_is_named(
    reference: Any, latent: str, record: Callable[..., StepRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause in the head's backward pass shows there, and not in the backbone's around it; likewise the others."""
    real = logprobs._TokenLogps.backward

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        time.sleep(SLOW)
        return real(ctx, grad)

    monkeypatch.setattr(logprobs._TokenLogps, "backward", staticmethod(backward))

    def slow_down(module: DPO) -> None:
        def pause(*_: Any) -> None:
            time.sleep(SLOW)

        module.policy.layers[0].register_forward_pre_hook(pause)
        if reference == "live":
            module.reference.policy.layers[0].register_forward_pre_hook(pause)  # type: ignore[union-attr]

    space = LATENTS[latent]
    recorder = record(DPO(policy=policy(), latent=space and space(), reference=reference), slow_down)
    steps = recorder.recording.shares
    assert len(steps) == 3
    for parts in steps:
        assert list(parts) == list(PARTS)
        slow = {part for part, seconds in parts.items() if seconds >= SLOW}
        expected = {"backbone forward", "head backward"} | ({"reference"} if reference == "live" else set())
        assert slow >= expected
        assert min(parts.values()) >= 0
    lengths = [end - start for start, end in zip(recorder.recording.ended, recorder.recording.ended[1:], strict=False)]
    assert [sum(parts.values()) for parts in steps[1:]] == pytest.approx(lengths, abs=SLOW / 2)
    typical = {part: sorted(parts[part] for parts in steps)[1] for part in PARTS}
    assert typical["backbone backward"] < SLOW
    assert typical["head forward"] < SLOW
    assert typical["other"] < SLOW
    if reference == "cached":
        assert typical["reference"] < SLOW / 10


def test_what_the_cache_took_is_recorded(record: Callable[..., StepRecorder]) -> None:
    recorder = record(DPO(policy=policy()))
    found = recorder.recording.reference
    assert (found["in_step"], found["pairs"]) == (False, 6)
    assert found["seconds"] > 0
    again = record(DPO(policy=policy())).recording.reference
    assert again["pairs"] == 0
    live = record(DPO(policy=policy(), reference="live")).recording.reference
    assert live == {"in_step": True, "pairs": 0, "seconds": 0}
