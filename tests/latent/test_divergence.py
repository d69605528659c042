"""KL against torch.distributions, and its weight in the loss."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from lpc_lightning.latent import Exponential, Linear, WarmUp
from lpc_lightning.latent.controls import gaussian_kl
from lpc_lightning.latent.discrete import categorical_kl
from lpc_lightning.latent.schedules import WeightedKL


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_categorical_kl_and_gradients() -> None:
    logits = [draw(6, 5, seed=seed).requires_grad_() for seed in (1, 2)]
    ours = categorical_kl(*(logit.log_softmax(-1) for logit in logits))
    theirs = kl_divergence(*(Categorical(logits=logit) for logit in logits))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert ours.shape == (6,)
    assert ours.min() > 0
    for actual, expected in zip(
        torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(theirs.sum(), logits), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_gaussian_kl_and_gradients() -> None:
    leaves = [draw(6, 4, seed=seed).requires_grad_() for seed in range(4)]
    mean_q, log_std_q, mean_p, log_std_p = leaves
    ours = gaussian_kl(*leaves)
    q, p = (Independent(Normal(mean, std.exp()), 1) for mean, std in ((mean_q, log_std_q), (mean_p, log_std_p)))
    theirs = kl_divergence(q, p)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for actual, expected in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_kl_of_equal_distributions_is_zero() -> None:
    logs = draw(3, 5).log_softmax(-1)
    assert torch.equal(categorical_kl(logs, logs), torch.zeros(3, dtype=torch.float64))
    mean, log_std = draw(3, 5, seed=1), draw(3, 5, seed=2)
    assert torch.equal(gaussian_kl(mean, log_std, mean, log_std), torch.zeros(3, dtype=torch.float64))


def test_weighted_kl_constant_below_free_bits() -> None:
    kl = torch.tensor([0.0, 0.1, 0.3, 0.5], requires_grad=True)
    penalty = WeightedKL(2.0, free_bits=0.2)(kl, 0.5)
    torch.testing.assert_close(penalty.detach(), torch.tensor([0.4, 0.4, 0.6, 1.0]))
    penalty.sum().backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == [0.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("weight", "values"),
    [
        (0.3, {0.0: 0.3, 1.0: 0.3}),
        (WarmUp(0.4, share=0.5), {0.0: 0.0, 0.25: 0.2, 0.5: 0.4, 1.0: 0.4}),
        (Linear(0.0, 2.0), {0.0: 0.0, 0.5: 1.0, 1.0: 2.0}),
        (Exponential(1.0, 0.01), {0.0: 1.0, 0.5: 0.1, 1.0: 0.01}),
    ],
)
def test_weighted_kl_follows_schedule(weight, values: dict[float, float]) -> None:
    kl = torch.tensor([0.5, 3.0], dtype=torch.float64)
    for progress, value in values.items():
        torch.testing.assert_close(WeightedKL(weight, 0.0)(kl, progress), value * kl, rtol=1e-13, atol=1e-15)
