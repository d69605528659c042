"""z of a discrete space at inference, by prior mode."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.latent import (
    ExpectedSpace,
    GaussianSpace,
    GumbelSpace,
    MarginalSpace,
    PosteriorOnlySpace,
    PriorOnlySpace,
)

SPACES = [GumbelSpace, ExpectedSpace, MarginalSpace, PriorOnlySpace, PosteriorOnlySpace]
every_space = pytest.mark.parametrize("kind", SPACES)


@pytest.fixture
def space(dpo_toy: Any, build: Callable[..., Any]) -> MarginalSpace:
    return build(MarginalSpace(num_codes=5, init_logit_std=1.0, hidden=8), dpo_toy)


def prior_of(space: MarginalSpace, prompt: Tensor, naive_network: Callable[..., Tensor]) -> Tensor:
    scores = naive_network(space.prior, prompt).exp()
    return scores / scores.sum(-1, keepdim=True)


def test_log_prior_matches_naive_softmax(
    space: MarginalSpace, dpo_toy: Any, naive_network: Callable[..., Tensor]
) -> None:
    prior = prior_of(space, dpo_toy.states.prompt, naive_network)
    torch.testing.assert_close(space.log_prior(dpo_toy.states.prompt), prior.log(), rtol=1e-12, atol=1e-12)


def test_infer_mean_weighs_codes_by_prior(
    space: MarginalSpace, dpo_toy: Any, naive_network: Callable[..., Tensor]
) -> None:
    prior = prior_of(space, dpo_toy.states.prompt, naive_network)
    expected = torch.stack(
        [sum(share * code for share, code in zip(row, space.codebook.weight, strict=True)) for row in prior]
    )
    for mode in (None, "mean"):
        torch.testing.assert_close(space.infer(dpo_toy.states.prompt, mode), expected, rtol=1e-12, atol=1e-12)


def test_infer_argmax_is_likeliest_code(
    space: MarginalSpace, dpo_toy: Any, naive_network: Callable[..., Tensor]
) -> None:
    likeliest = prior_of(space, dpo_toy.states.prompt, naive_network).argmax(-1)
    assert len(set(likeliest.tolist())) > 1, "the pairs should differ"
    assert torch.equal(space.infer(dpo_toy.states.prompt, "argmax"), space.codebook.weight[likeliest])


@pytest.mark.parametrize("code", range(5))
def test_infer_number_is_that_code(space: MarginalSpace, dpo_toy: Any, code: int) -> None:
    z = space.infer(dpo_toy.states.prompt, code)
    assert torch.equal(z, space.codebook.weight[code].expand(4, -1))


def test_infer_sample_frequencies(space: MarginalSpace, dpo_toy: Any, naive_network: Callable[..., Tensor]) -> None:
    draws = 4000
    prompt = dpo_toy.states.prompt[:1].detach()
    (prior,) = prior_of(space, prompt, naive_network).detach()
    torch.manual_seed(0)
    samples = space.infer(prompt.expand(draws, -1), "sample")
    counts = torch.stack([(samples == code).all(-1).sum() for code in space.codebook.weight])
    assert counts.sum() == draws
    deviation = (draws * prior * (1 - prior)).sqrt()
    assert ((counts - draws * prior).abs() < 4 * deviation + 1).all()
    assert counts.max() < draws


@pytest.mark.parametrize("mode", ["mean", "argmax", 2])
def test_infer_default_mode(mode: Any, dpo_toy: Any, build: Callable[..., Any]) -> None:
    space = build(MarginalSpace(num_codes=5, init_logit_std=1.0, hidden=8, prior_mode=mode), dpo_toy)
    modes = {name: space.infer(dpo_toy.states.prompt, name) for name in ("mean", "argmax", 2)}
    assert torch.equal(space.infer(dpo_toy.states.prompt), modes.pop(mode))
    assert not any(torch.equal(space.infer(dpo_toy.states.prompt), other) for other in modes.values())


@every_space
@pytest.mark.parametrize("mode", ["median", 5, -1, "5", None.__class__])
def test_infer_unknown_mode(kind: Any, mode: Any, dpo_toy: Any, build: Callable[..., Any]) -> None:
    message = re.escape(f"latent.prior_mode: found {mode!r}, expected one of mean, sample, argmax, or the number of a")
    with pytest.raises(ValueError, match=message + " code from 0 to 4"):
        kind(num_codes=5, prior_mode=mode)
    space = build(kind(num_codes=5, hidden=8), dpo_toy)
    with pytest.raises(ValueError, match=message):
        space.infer(dpo_toy.states.prompt, mode)


@pytest.mark.parametrize("kind", [*SPACES, GaussianSpace])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_codes", 0),
        ("num_codes", -3),
        ("init_logit_std", -0.1),
        ("init_logit_std", math.nan),
        ("init_logit_std", math.inf),
        ("hidden", 0),
    ],
)
def test_settings_out_of_range(kind: Any, setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"latent.{setting}: found {value}"):
        kind(**{setting: value})


@every_space
def test_inference_terms_run_no_posterior(kind: Any, toy: Any, build: Callable[..., Any]) -> None:
    space = build(kind(num_codes=5, init_logit_std=1.0, hidden=8, prior_mode="argmax"), toy)
    runs: list[str] = []
    if hasattr(space, "posterior"):
        space.posterior.register_forward_hook(lambda *_: runs.append("posterior"))
    terms = space.inference_terms(toy.states, toy.score)
    assert not runs
    expected = toy.naive_losses(space.infer(toy.states.prompt))
    torch.testing.assert_close(terms.pairs.losses, expected, rtol=1e-10, atol=1e-10)
    assert terms.penalty == 0
    assert terms.kl is None
    assert terms.posterior is None
    assert torch.equal(terms.prior, space.log_prior(toy.states.prompt))
    assert torch.equal(terms.z, space.infer(toy.states.prompt))

    space.training_terms(toy.states, toy.score, 0.5)
    assert len(runs) == hasattr(space, "posterior"), "the hook is called"
