"""Tests of the time split of real steps: every second belongs to one part, the part that took it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.recorder import reference_of
from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import StepProfile
from lpc_lightning.callbacks.step_parts import PARTS, covered
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import LoRA, TinyPolicy, causal, logprobs

SLOW = 0.05
"""Seconds by which a part is slowed down: far more than all of a tiny step takes."""
LATENTS: dict[str, Callable[[], LatentSpace | None]] = {
    "plain": lambda: None,
    "gumbel": lambda: GumbelSpace(num_codes=3, hidden=8),
    "marginal": lambda: MarginalSpace(num_codes=3, hidden=8),
}


class Ends(Callback):
    """Stores when each batch ended, and the losses."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[torch.Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times.append(time.perf_counter())
        self.losses.append(outputs["losses"])


Fit = Callable[..., tuple[StepProfile, Ends]]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Function that trains for five batches and returns the callbacks."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    def run(module: DPO, profile: StepProfile | None, prepare: Any = lambda module: None, **settings: Any) -> Any:
        seed_everything(0, verbose=False)
        data = SyntheticPreferences(train_pairs=10, validation_pairs=2, batch_size=2, cache_dir=str(tmp_path / "cache"))
        module.configure_model()
        prepare(module)
        ends = Ends()
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
        callbacks: list[Callback] = [ends] if profile is None else [profile, ends]
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, callbacks=callbacks, enable_model_summary=False,
            num_sanity_val_steps=0, default_root_dir=tmp_path, **(quiet | settings),
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        return profile, ends

    return run


def policy() -> TinyPolicy:
    return TinyPolicy(width=16, layers=1, heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_slow_parts_are_named(
    reference: Any, latent: str, fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pause in the head's backward pass belongs to it, and not to the backbone's around it; likewise the others."""
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

    module = DPO(policy=policy(), latent=LATENTS[latent](), reference=reference)
    profile, ends = fit(module, StepProfile(2, 3), slow_down)
    assert list(profile.seconds) == list(PARTS)
    expected = {"backbone forward", "head backward"} | ({"reference"} if reference == "live" else set())
    assert {part for part, seconds in profile.seconds.items() if seconds >= SLOW} == expected
    assert min(profile.seconds.values()) >= 0
    wall = (ends.times[4] - ends.times[1]) / 3
    assert sum(profile.seconds.values()) == pytest.approx(wall, rel=0.05)
    table = capsys.readouterr().out
    assert "| head backward " in table
    assert "GPU idle" not in table


def test_backward_pass_of_a_frozen_head_is_named(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head under adapters computes its gradient in the forward pass. What remains has a part of its own."""
    real = logprobs._FrozenHeadLogps.backward

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        time.sleep(SLOW)
        return real(ctx, grad)

    monkeypatch.setattr(logprobs._FrozenHeadLogps, "backward", staticmethod(backward))
    adapted = TinyPolicy(width=16, layers=1, heads=2, lora=LoRA(rank=2))
    profile, _ = fit(DPO(policy=adapted), StepProfile(2, 3))
    assert profile.seconds["head backward"] >= SLOW


@pytest.mark.slow
def test_validation_among_measured_steps_is_left_out(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each validation is far longer than a step, and runs the same backbone and head."""
    real = DPO.validation_step

    def validation_step(module: DPO, *arguments: Any) -> Any:
        hook = module.policy.layers[0].register_forward_pre_hook(lambda *_: time.sleep(SLOW))
        try:
            return real(module, *arguments)
        finally:
            hook.remove()

    monkeypatch.setattr(DPO, "validation_step", validation_step)
    module = DPO(policy=policy(), latent=GumbelSpace(num_codes=3, hidden=8))
    profile, _ = fit(module, StepProfile(1, 4), val_check_interval=1)
    assert min(profile.seconds.values()) >= 0
    assert max(profile.seconds.values()) < SLOW


@pytest.mark.slow
def test_profile_leaves_results_and_calls_unchanged(fit: Fit) -> None:
    calls = [getattr(causal.BatchForward, name) for name in ("logps", "logps_per_code")]
    backward = logprobs._TokenLogps.backward
    module = DPO(policy=policy(), latent=MarginalSpace(num_codes=3, hidden=8))
    profile, ends = fit(module, StepProfile(0, 2))
    assert sum(profile.seconds.values()) > 0
    _, plain = fit(DPO(policy=policy(), latent=MarginalSpace(num_codes=3, hidden=8)), None)
    assert all(torch.equal(one, other) for one, other in zip(ends.losses, plain.losses, strict=True))
    assert [getattr(causal.BatchForward, name) for name in ("logps", "logps_per_code")] == calls
    assert logprobs._TokenLogps.backward is backward
    assert not {"hidden", "training_terms", "configure_gradient_clipping"} & (vars(module) | vars(module.policy)).keys()


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "steps"), [(2, 2), (1, 4)])
def test_short_run_reports_the_steps_that_it_has(accumulate: int, steps: int, fit: Fit) -> None:
    """Five batches after one step of warm-up, of two batches or of one. Validations between steps are left out."""
    profile, ends = fit(
        DPO(policy=policy()), StepProfile(1, 8), accumulate_grad_batches=accumulate, val_check_interval=1
    )
    assert len(ends.times) == 5
    wall = (ends.times[-1] - ends.times[accumulate - 1]) / steps
    assert 0 < sum(profile.seconds.values()) < wall


@pytest.mark.slow
@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
@pytest.mark.filterwarnings("ignore:.*Profiler:UserWarning")  # torch's own, of the columns of its table
def test_lightning_profilers_run_with_packed_steps(profiler: str, fit: Fit, tmp_path: Path) -> None:
    _, ends = fit(DPO(policy=policy(), latent=MarginalSpace(num_codes=3, hidden=8)), None, profiler=profiler)
    assert len(ends.times) == 5


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_times_and_idle_share(fit: Fit) -> None:
    """Device times of steps add up to the host's, which waits for the device at the end of the profile."""
    profile, ends = fit(DPO(policy=policy()), StepProfile(1, 2), accelerator="gpu")
    assert profile.idle is not None
    assert 0 < profile.idle < 1
    assert sum(profile.seconds.values()) == pytest.approx((ends.times[2] - ends.times[0]) / 2, rel=0.5)


def test_covered_counts_overlaps_once() -> None:
    assert covered([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]) == 4.0


@pytest.mark.slow
def test_cache_time_of_the_reference_is_recorded(fit: Fit) -> None:
    first, again, live = (DPO(policy=policy(), reference=kind) for kind in ("cached", "cached", "live"))
    for module in (first, again, live):
        fit(module, None)
    found = reference_of(first)
    assert (found["in_step"], found["pairs"]) == (False, 12)
    assert found["seconds"] > 0
    assert reference_of(again)["pairs"] == 0
    assert reference_of(live) == {"in_step": True, "pairs": 0, "seconds": 0}
