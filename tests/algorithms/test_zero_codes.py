"""Tests of whole steps with a latent of zeros against steps without a latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.data.batching.layouts import Layout
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import TokenizedPair
from tests.algorithms.conftest import Make, every_layout
from tests.fixtures.spaces import SPACES, make_space

PER_CODE = ("expected", "marginal")
"""Spaces whose losses are sums over codes, which are rounded. All others use the plain log-probabilities."""


def policy_gradients(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if name.startswith("policy.")}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SPACES))
@pytest.mark.parametrize("algorithm", ["dpo", "ipo", "simpo", "kto", "orpo"])
@every_layout
def test_step_with_zero_codes_is_plain(
    name: str,
    algorithm: str,
    layout: Layout,
    pairs: list[TokenizedPair],
    make: Make,
    train_step: Callable[..., Any],
    once: Callable[..., Any],
) -> None:
    plain = once(("plain", algorithm, layout), lambda: train_step(make(algorithm), pairs, layout))
    latent = train_step(make(algorithm, make_space(name, init_logit_std=0.0, kl_weight=0.7)), pairs, layout)
    tolerance = 1e-12 if name in PER_CODE else 0.0
    torch.testing.assert_close(latent.loss.double(), plain.loss, rtol=tolerance, atol=0)
    gradients = policy_gradients(latent.gradients)
    assert set(gradients) == set(plain.gradients)
    for weight, gradient in plain.gradients.items():
        torch.testing.assert_close(gradients[weight], gradient, rtol=10 * tolerance, atol=10 * tolerance)
    assert latent.metrics["train/latent/z_norm_ratio"] == 0


@pytest.mark.parametrize("name", list(SPACES))
def test_validation_with_zero_codes_is_plain(
    name: str,
    pairs: list[TokenizedPair],
    make: Make,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    once: Callable[..., Any],
) -> None:
    def validated(latent: LatentSpace | None) -> dict[str, float]:
        trainer = make_trainer()
        trainer.validate(make("dpo", latent), make_loader(pairs), verbose=False)
        return {metric: float(value) for metric, value in trainer.callback_metrics.items()}

    plain, latent_metrics = once("validated", lambda: validated(None)), validated(make_space(name, init_logit_std=0.0))
    assert set(plain) == {
        *("val/loss", "val/logps/chosen", "val/logps/rejected"),
        *(f"val/rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
    }
    for metric, value in plain.items():
        assert latent_metrics[metric] == value
