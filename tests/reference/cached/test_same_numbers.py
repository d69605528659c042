"""Tests that runs with cached and live reference are equal, and that the cached one has one model less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lpc_lightning.algorithms import DPO, IPO, PreferenceModule
from lpc_lightning.data.tokenization.tokens import TokenStore
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import LoRA


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def gumbel() -> GumbelSpace:
    return GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0)


def marginal() -> MarginalSpace:
    return MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
@pytest.mark.parametrize("latent", [None, gumbel, marginal], ids=["plain", "gumbel", "marginal"])
@pytest.mark.parametrize("algorithm", [DPO, IPO])
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("64-true", 1e-11), ("32-true", 1e-6)], ids=["float64", "float32"]
)
def test_cached_run_equals_live_run(
    precision: Any,
    tolerance: float,
    algorithm: Callable[..., PreferenceModule],
    latent: Callable[[], LatentSpace] | None,
    lora: LoRA | None,
    small_policy: Any,
    own_data: Any,
    fit_run: Any,
) -> None:
    dtype = {"64-true": "float64", "32-true": "float32"}[precision]

    def run(reference: str) -> Any:
        module = algorithm(
            policy=small_policy(lora=lora, dtype=dtype),
            latent=latent and latent(),
            reference=reference,
            optimizer=adam,
        )
        return fit_run(module, own_data(), max_epochs=1, limit_train_batches=6, precision=precision)

    live, cached = run("live"), run("cached")
    names = {"train/loss", "train/logps/chosen", "train/rewards/chosen"}
    assert all(names <= set(row) for row in live.training.values())
    for step, row in live.training.items():
        assert cached.training[step]["train/loss"] == pytest.approx(row["train/loss"], rel=tolerance)
    (one,), (other,) = (pair.log.with_prefix("val/").values() for pair in (live, cached))
    assert other["val/loss"] == pytest.approx(one["val/loss"], rel=tolerance)
    assert len(set(cached.losses)) >= 5  # the rate of the first step is 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_bfloat16_values_keep_their_precision(precision: Any, small_policy: Any, own_data: Any, fit_run: Any) -> None:
    """Log-probabilities of about 400 nats, rounded to bfloat16, have errors of up to a nat."""
    runs = []
    for reference_kind in ("live", "cached"):
        module = DPO(policy=small_policy(), reference=reference_kind, optimizer=adam)
        runs.append(fit_run(module, own_data(), max_epochs=1, precision=precision))
    live, cached = runs
    assert min(abs(row["train/logps/chosen"]) for row in live.training.values()) > 256
    for step, row in live.training.items():
        for side in ("chosen", "rejected"):
            # Beta times the difference of a mean over two pairs.
            distance = abs(row[f"train/rewards/{side}"] - cached.training[step][f"train/rewards/{side}"]) / 0.1
            assert distance < 0.2, step


def test_flipped_pair_has_swapped_values(
    small_policy: Any, own_data: Any, fit_run: Any, monkeypatch: pytest.MonkeyPatch, parts: Any
) -> None:
    get_pair = TokenStore.__getitem__

    def some_flipped(store: TokenStore, index: Any) -> Any:
        pair = get_pair(store, index)
        return pair.swapped() if index % 3 == 0 else pair

    runs = {}
    fit_run(DPO(policy=small_policy()), own_data(), max_epochs=1)
    there = parts()
    monkeypatch.setattr(TokenStore, "__getitem__", some_flipped)
    for reference_kind in ("live", "cached"):
        module = DPO(policy=small_policy(), reference=reference_kind, optimizer=adam)
        runs[reference_kind] = fit_run(module, own_data(), max_epochs=1)
    assert parts() == there
    assert runs["cached"].losses == pytest.approx(runs["live"].losses, rel=1e-5)


def size(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("lora", [None, LoRA(rank=2, alpha=4)], ids=["full", "lora"])
def test_cached_reference_uses_no_memory(lora: LoRA | None, small_policy: Any, fit_run: Any) -> None:
    sizes = {}
    for reference_kind in ("live", "cached"):
        module = DPO(policy=small_policy(lora=lora), latent=marginal(), reference=reference_kind)
        fit_run(module, max_steps=1)
        assert module.latent is not None
        sizes[reference_kind] = size(module) - size(module.latent)
    policy = size(small_policy(lora=lora).build())
    assert sizes == {"live": policy if lora else 2 * policy, "cached": policy}
