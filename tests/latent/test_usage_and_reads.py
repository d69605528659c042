"""Options of the estimators: the diversity penalty, and the input of the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lpc_lightning.latent import (
    ExpectedSpace,
    GumbelSpace,
    LatentSpace,
    MarginalSpace,
    PosteriorOnlySpace,
    PriorOnlySpace,
)
from lpc_lightning.types import PairStates

SIZE: dict[str, Any] = {"num_codes": 3, "init_logit_std": 1.0, "hidden": 8}
DISCRETE = [MarginalSpace, ExpectedSpace, GumbelSpace, PriorOnlySpace, PosteriorOnlySpace]
WITH_POSTERIOR = [ExpectedSpace, GumbelSpace, PosteriorOnlySpace]
Build = Callable[..., Any]


@pytest.mark.parametrize("kind", DISCRETE)
def test_diversity_penalty_is_missing_entropy(kind: Any, dpo_toy: Any, build: Build) -> None:
    def step(weight: float) -> Any:
        space = build(kind(diversity_weight=weight, **SIZE), dpo_toy)
        torch.manual_seed(0)
        terms = space.training_terms(dpo_toy.states, dpo_toy.score, 0.5)
        return space, terms.pairs.losses + terms.penalty

    _, without = step(0.0)
    space, penalized = step(0.7)
    prior = space.prior(dpo_toy.states.prompt)
    mean_prior = [sum(math.exp(row[k]) / sum(math.exp(x) for x in row) for row in prior.tolist()) / 4 for k in range(3)]
    penalty = 0.7 * (math.log(3) + sum(share * math.log(share) for share in mean_prior))
    assert penalty > 0.001
    torch.testing.assert_close(penalized, without + penalty, rtol=1e-12, atol=1e-12)


def test_diversity_penalty_gradient(dpo_toy: Any, build: Build) -> None:
    space = build(MarginalSpace(diversity_weight=1.0, **SIZE), dpo_toy)
    logits = torch.tensor([[3.0, 0.0, 0.0], [3.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    space.diversity_penalty(logits.log_softmax(-1)).mean().backward()
    assert (logits.grad[:, 0] > 0).all()
    assert torch.autograd.gradcheck(lambda x: space.diversity_penalty(x.log_softmax(-1)), logits)


def test_diversity_penalty_of_even_use_is_zero(dpo_toy: Any, build: Build) -> None:
    space = build(MarginalSpace(diversity_weight=1.0, **SIZE), dpo_toy)
    one_hot = torch.eye(3, dtype=torch.float64).log()
    assert float(space.diversity_penalty(one_hot).abs().max()) < 1e-12


@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_diversity_weight_out_of_range(weight: float) -> None:
    with pytest.raises(ValueError, match=rf"latent\.diversity_weight: found {weight}, expected a number of at least 0"):
        MarginalSpace(diversity_weight=weight)


@pytest.mark.parametrize("kind", WITH_POSTERIOR)
@pytest.mark.parametrize("reads", ["both", "difference", "sum"])
def test_posterior_reads_setting(kind: Any, reads: Any, dpo_toy: Any, build: Build, naive_network: Build) -> None:
    space, states = build(kind(posterior_reads=reads, **SIZE), dpo_toy), dpo_toy.states
    inputs = {
        "both": (states.chosen, states.rejected),
        "difference": (states.chosen - states.rejected,),
        "sum": (states.chosen + states.rejected,),
    }
    expected = naive_network(space.posterior, *inputs[reads]).log_softmax(-1)
    torch.testing.assert_close(space.log_posterior(states, dpo_toy.score), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("reads", "depends"), [("both", True), ("difference", True), ("sum", False)])
def test_posterior_reads_sum_ignores_label(reads: Any, depends: bool, dpo_toy: Any, build: Build) -> None:
    space: LatentSpace = build(GumbelSpace(posterior_reads=reads, **SIZE), dpo_toy)
    states: PairStates = dpo_toy.states
    swapped = replace(states, chosen=states.rejected, rejected=states.chosen)
    one, other = (space.log_posterior(pairs, dpo_toy.score) for pairs in (states, swapped))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other) is not depends


def test_posterior_reads_unknown(dpo_toy: Any) -> None:
    space = GumbelSpace(posterior_reads="label", **SIZE)
    with pytest.raises(
        ValueError, match=r"latent\.posterior_reads: found 'label', expected one of both, difference, sum"
    ):
        space.build(6, dpo_toy.head)


def test_diversity_gradient_of_an_unused_code(dpo_toy: Any, build: Build) -> None:
    """In float32 the weight exp(-110) of the second code is 0. The limit of its gradient is 0, too."""
    space = build(MarginalSpace(diversity_weight=1.0, num_codes=2, hidden=4), dpo_toy)
    logits = torch.tensor([[0.0, -110.0]], requires_grad=True)
    penalty = space.diversity_penalty(logits.log_softmax(-1))
    penalty.sum().backward()
    assert penalty.item() == pytest.approx(math.log(2))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(1, 2))
