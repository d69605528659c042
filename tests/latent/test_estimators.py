"""Gumbel, expected and marginal estimators against loops over the codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.latent import (
    ExpectedSpace,
    Exponential,
    GumbelSpace,
    LatentTerms,
    Linear,
    MarginalSpace,
    PosteriorOnlySpace,
    PriorOnlySpace,
    WarmUp,
)
from lpc_lightning.losses import dpo_loss
from lpc_lightning.robust import REPO

CODES = 3
SIZE: dict[str, Any] = {"num_codes": CODES, "init_logit_std": 1.0, "hidden": 8}
Network = Callable[..., Tensor]


def total(terms: LatentTerms) -> Tensor:
    """Compute the loss of a training step."""
    return (terms.pairs.losses + terms.penalty).mean()


def softmax(scores: Tensor) -> Tensor:
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def prior_and_posterior(space: Any, toy: Any, network: Network) -> tuple[Tensor, Tensor]:
    states = toy.states
    return softmax(network(space.prior, states.prompt)), softmax(
        network(space.posterior, states.chosen, states.rejected)
    )


def losses_by_code(space: Any, toy: Any) -> Tensor:
    """Compute the losses (B, K), one code at a time."""
    return torch.stack([toy.naive_losses(code.expand(4, -1)) for code in space.codebook.weight], dim=1)


def kl_of(posterior: Tensor, prior: Tensor) -> Tensor:
    return kl_divergence(Categorical(probs=posterior), Categorical(probs=prior))


def assert_same_loss_and_gradients(ours: Tensor, theirs: Tensor, space: Any, toy: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    named = {"hidden": toy.hidden, "head": toy.weight} | dict(space.named_parameters())
    actual = torch.autograd.grad(ours, list(named.values()), retain_graph=True)
    expected = torch.autograd.grad(theirs, list(named.values()))
    for name, one, other in zip(named, actual, expected, strict=True):
        assert other.abs().max() > 1e-6, f"{name} has no gradient"
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


# Marginal


def test_marginal_is_soft_minimum_over_codes(toy: Any, build: Callable[..., Any], naive_network: Network) -> None:
    space = build(MarginalSpace(**SIZE), toy)
    terms = space.training_terms(toy.states, toy.score, 0.3)
    prior, by_code = softmax(naive_network(space.prior, toy.states.prompt)), losses_by_code(space, toy)
    expected = []
    for pair in range(4):
        likelihoods = torch.exp(-toy.naive_nats * by_code[pair])
        likelihood = sum(prior[pair, code] * likelihoods[code] for code in range(CODES))
        expected.append(-torch.log(likelihood) / toy.naive_nats)
    assert_same_loss_and_gradients(total(terms), torch.stack(expected).mean(), space, toy)
    assert terms.penalty == 0


def test_marginal_of_dpo_is_label_likelihood(dpo_toy: Any, build: Callable[..., Any], naive_network: Network) -> None:
    space = build(MarginalSpace(**SIZE), dpo_toy)
    prior = softmax(naive_network(space.prior, dpo_toy.states.prompt))
    likelihood = torch.zeros(4, dtype=torch.float64)
    for number, code in enumerate(space.codebook.weight):
        ratios = dpo_toy.naive_logps(code.expand(4, -1)) - dpo_toy.reference
        likelihood = likelihood + prior[:, number] / (1 + torch.exp(-0.7 * (ratios[:4] - ratios[4:])))
    terms = space.training_terms(dpo_toy.states, dpo_toy.score, 0.0)
    torch.testing.assert_close(terms.pairs.losses, -torch.log(likelihood), rtol=1e-11, atol=1e-12)


def test_marginal_of_kto_averages_judgements(
    toy_of: Callable[[str], Any], build: Callable[..., Any], naive_network: Network
) -> None:
    """The loss is KTO's, 1 - P, of the mixture's P for each answer. The evidence is that of both judgements."""
    toy = toy_of("kto")
    space = build(MarginalSpace(**SIZE), toy)
    prior = softmax(naive_network(space.prior, toy.states.prompt))
    desirable, undesirable = [], []
    for code in space.codebook.weight:
        ratios = toy.naive_logps(code.expand(4, -1)) - toy.reference
        desirable.append(1 / (1 + torch.exp(-0.7 * (ratios[:4] - 0.4))))
        undesirable.append(1 / (1 + torch.exp(0.7 * (ratios[4:] - 0.4))))
    first, second = (torch.stack(chances, dim=1) for chances in (desirable, undesirable))
    terms = space.training_terms(toy.states, toy.score, 0.0)
    joint = prior * first * second
    torch.testing.assert_close(space.log_evidence(toy.states.prompt, toy.score), joint.sum(1).log())
    torch.testing.assert_close(terms.posterior.exp(), (joint / joint.sum(1, keepdim=True)).detach())
    losses = ((1 - (prior * first).sum(1)) + 1.5 * (1 - (prior * second).sum(1))) / 2
    assert_same_loss_and_gradients(total(terms), losses.mean(), space, toy)


def test_marginal_of_orpo_mixes_label_and_text(
    toy_of: Callable[[str], Any], build: Callable[..., Any], naive_network: Network
) -> None:
    toy = toy_of("orpo")
    space = build(MarginalSpace(**SIZE), toy)
    prior = softmax(naive_network(space.prior, toy.states.prompt))
    likelihood, text = torch.zeros(2, 4, dtype=torch.float64)
    for number, code in enumerate(space.codebook.weight):
        logps = toy.naive_logps(code.expand(4, -1))
        text = text + prior[:, number] * torch.exp(logps[:4])
        means = torch.exp(logps / toy.batch.lengths)
        odds = means / (1 - means)
        likelihood = likelihood + prior[:, number] * odds[:4] / (odds[:4] + odds[4:])
    terms = space.training_terms(toy.states, toy.score, 0.0)
    torch.testing.assert_close(space.log_evidence(toy.states.prompt, toy.score), likelihood.log())
    losses = -0.3 * likelihood.log() - text.log() / toy.batch.lengths[:4]
    assert_same_loss_and_gradients(total(terms), losses.mean(), space, toy)


def test_marginal_posterior_exact(toy: Any, build: Callable[..., Any], naive_network: Network) -> None:
    space = build(MarginalSpace(**SIZE), toy)
    terms = space.training_terms(toy.states, toy.score, 0.0)
    joint = softmax(naive_network(space.prior, toy.states.prompt)) * torch.exp(
        -toy.naive_nats * losses_by_code(space, toy)
    )
    posterior = joint / joint.sum(-1, keepdim=True)
    torch.testing.assert_close(terms.posterior.exp(), posterior.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms.kl, kl_of(posterior, terms.prior.exp()).detach(), rtol=1e-8, atol=1e-12)
    assert (terms.kl > 0).all()
    assert not terms.kl.requires_grad
    assert not terms.posterior.requires_grad


def test_expected_bounds_marginal(toy: Any, build: Callable[..., Any]) -> None:
    marginal = build(MarginalSpace(**SIZE), toy)
    expected = build(ExpectedSpace(**SIZE, kl_weight=1 / toy.naive_nats), toy)
    expected.codebook.load_state_dict(marginal.codebook.state_dict())
    expected.prior.load_state_dict(marginal.prior.state_dict())
    exact = marginal.training_terms(toy.states, toy.score, 0.0)
    bound = expected.training_terms(toy.states, toy.score, 0.0)
    assert (bound.pairs.losses + bound.penalty > exact.pairs.losses + 1e-6).all()
    by_code, _ = toy.score.under_codes(marginal.codebook.weight)
    tight = (exact.posterior.exp() * by_code.losses).sum(-1) + exact.kl / toy.naive_nats
    torch.testing.assert_close(tight, exact.pairs.losses, rtol=1e-11, atol=1e-11)


def test_marginal_reports_prior_expectations(toy: Any, build: Callable[..., Any]) -> None:
    space = build(MarginalSpace(**SIZE), toy)
    terms = space.training_terms(toy.states, toy.score, 0.0)
    assert_expectations(terms, terms.prior, space, toy)


def assert_expectations(terms: LatentTerms, log_weights: Tensor, space: Any, toy: Any) -> None:
    chosen, rejected, rewards = (torch.zeros(4, dtype=torch.float64) for _ in range(3))
    for number, code in enumerate(space.codebook.weight):
        weight = log_weights.exp()[:, number]
        pairs, _ = toy.score.under(code.expand(4, -1))
        logps = toy.naive_logps(code.expand(4, -1))
        chosen, rejected = chosen + weight * logps[:4], rejected + weight * logps[4:]
        rewards = rewards + weight * (pairs.chosen_rewards - pairs.rejected_rewards)
    torch.testing.assert_close(terms.logps.policy_chosen, chosen.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms.logps.policy_rejected, rejected.detach(), rtol=1e-10, atol=1e-10)
    margins = terms.pairs.chosen_rewards - terms.pairs.rejected_rewards
    torch.testing.assert_close(margins, rewards.detach(), rtol=1e-10, atol=1e-10)
    assert not margins.requires_grad
    mean = log_weights.exp() @ space.codebook.weight
    torch.testing.assert_close(terms.z, mean.detach(), rtol=1e-12, atol=1e-12)
    assert not terms.z.requires_grad


# Expected


@pytest.mark.parametrize(("kl_weight", "progress", "weight"), [(0.3, 0.5, 0.3), (WarmUp(0.4, share=0.5), 0.25, 0.2)])
def test_expected_matches_loop_over_codes(
    kl_weight: Any, progress: float, weight: float, toy: Any, build: Callable[..., Any], naive_network: Network
) -> None:
    space = build(ExpectedSpace(**SIZE, kl_weight=kl_weight), toy)
    terms = space.training_terms(toy.states, toy.score, progress)
    prior, posterior = prior_and_posterior(space, toy, naive_network)
    by_code = losses_by_code(space, toy)
    expected = []
    for pair in range(4):
        mean = sum(posterior[pair, code] * by_code[pair, code] for code in range(CODES))
        kl = sum(posterior[pair, code] * torch.log(posterior[pair, code] / prior[pair, code]) for code in range(CODES))
        expected.append(mean + weight * kl)
    assert_same_loss_and_gradients(total(terms), torch.stack(expected).mean(), space, toy)
    assert_expectations(terms, posterior.log(), space, toy)
    torch.testing.assert_close(terms.kl, kl_of(posterior, prior), rtol=1e-10, atol=1e-12)


def test_expected_re_po_is_likelihood(dpo_toy: Any, build: Callable[..., Any], naive_network: Network) -> None:
    """The posterior leaves codes that call the label wrong, although the published loss is small under them."""
    loss = partial(REPO(0.9).pair_losses, partial(dpo_loss, beta=0.7))
    score = BatchScorer(dpo_toy.reading, dpo_toy.batch.lengths, dpo_toy.reference, loss)
    space = build(ExpectedSpace(**SIZE, kl_weight=0.3), dpo_toy)
    prior, posterior = prior_and_posterior(space, dpo_toy, naive_network)
    right = torch.exp(-losses_by_code(space, dpo_toy))
    likelihood = 0.9 * right + 0.1 * (1 - right)
    expected = -(posterior * torch.log(likelihood)).sum(-1) + 0.3 * kl_of(posterior, prior)
    terms = space.training_terms(dpo_toy.states, score, 0.0)
    assert_same_loss_and_gradients(total(terms), expected.mean(), space, dpo_toy)


# Gumbel


def noise() -> Tensor:
    """Draw the noise of the next call of `gumbel_softmax`: -log of an exponential."""
    return -torch.empty(4, CODES, dtype=torch.float64).exponential_().log()


def hardened(weights: Tensor) -> Tensor:
    """Return one-hot weights with the gradient of the soft weights."""
    hard = torch.zeros_like(weights)
    hard[torch.arange(4), weights.argmax(-1)] = 1.0
    return hard + weights - weights.detach()


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("settings", "progress", "g", "tau"),
    [
        ({}, 0.0, 0.0, 1.0),
        ({}, 0.25, 0.25, 1.0),
        ({}, 1.0, 1.0, 1.0),
        ({"g": 0.4, "tau": 0.5}, 0.9, 0.4, 0.5),
        ({"g": Linear(1.0, 0.5), "tau": Exponential(4.0, 0.25)}, 0.5, 0.75, 1.0),
        ({"tau": Exponential(1.0, 0.25)}, 0.5, 0.5, 0.5),
    ],
)
def test_gumbel_matches_naive_mixture(
    settings: dict[str, Any],
    progress: float,
    g: float,
    tau: float,
    hard: bool,
    toy: Any,
    build: Callable[..., Any],
    naive_network: Network,
) -> None:
    space = build(GumbelSpace(**SIZE, **settings, hard=hard, kl_weight=0.3), toy)
    torch.manual_seed(11)
    terms = space.training_terms(toy.states, toy.score, progress)
    prior, posterior = prior_and_posterior(space, toy, naive_network)
    torch.manual_seed(11)
    from_prior = softmax((prior.log() + noise()) / tau)
    from_posterior = softmax((posterior.log() + noise()) / tau)
    if hard:
        from_prior, from_posterior = hardened(from_prior), hardened(from_posterior)
    weights = (1 - g) * from_posterior + g * from_prior
    z = torch.stack([sum(weights[pair, k] * space.codebook.weight[k] for k in range(CODES)) for pair in range(4)])
    torch.testing.assert_close(terms.z, z, rtol=1e-11, atol=1e-11)
    kl = kl_of(posterior, prior)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-10, atol=1e-12)
    assert_same_loss_and_gradients(total(terms), (toy.naive_losses(z) + 0.3 * kl).mean(), space, toy)
    assert terms.settings == pytest.approx({"g": g, "tau": tau})
    if hard and g in (0.0, 1.0):
        own = torch.stack([(terms.z == code).all(-1) for code in space.codebook.weight])
        assert own.sum(0).tolist() == [1] * 4, "exactly one code in the forward pass"


@pytest.mark.parametrize(("g", "absent", "present"), [(0.0, "prior", "posterior"), (1.0, "posterior", "prior")])
def test_gumbel_at_ends_of_g_uses_one_network(
    g: float, absent: str, present: str, dpo_toy: Any, build: Callable[..., Any]
) -> None:
    space = build(GumbelSpace(**SIZE, g=g), dpo_toy)
    z = space.training_terms(dpo_toy.states, dpo_toy.score, 0.5).z
    gradients = {
        name: torch.autograd.grad(z.square().sum(), list(getattr(space, name).parameters()), retain_graph=True)
        for name in (absent, present)
    }
    assert not any(gradient.any() for gradient in gradients[absent])
    assert all(gradient.any() for gradient in gradients[present])


def test_gumbel_default_g_rises_linearly(dpo_toy: Any, build: Callable[..., Any]) -> None:
    space = build(GumbelSpace(**SIZE), dpo_toy)
    actual = [space.training_terms(dpo_toy.states, dpo_toy.score, at).settings["g"] for at in (0.0, 0.1, 0.5, 1.0)]
    assert actual == [0.0, 0.1, 0.5, 1.0]


def test_free_bits_change_penalty_but_not_kl(dpo_toy: Any, build: Callable[..., Any]) -> None:
    for kind in (GumbelSpace, ExpectedSpace):
        space = build(kind(**SIZE, kl_weight=0.5, free_bits=100.0), dpo_toy)
        terms = space.training_terms(dpo_toy.states, dpo_toy.score, 0.0)
        assert torch.equal(terms.penalty.detach(), torch.full((4,), 50.0, dtype=torch.float64))
        assert (terms.kl < 100).all()
        assert not torch.autograd.grad(terms.penalty.sum(), space.prior.first.weight)[0].any()


# Controls that are estimators


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_posterior_only_is_gumbel_with_g_0(progress: float, toy: Any, build: Callable[..., Any]) -> None:
    actual = []
    for space in (PosteriorOnlySpace(**SIZE, tau=0.7), GumbelSpace(**SIZE, tau=0.7, g=0.0)):
        built = build(space, toy)
        torch.manual_seed(11)
        actual.append(built.training_terms(toy.states, toy.score, progress))
    assert torch.equal(actual[0].z, actual[1].z)
    assert torch.equal(total(actual[0]), total(actual[1]))
    assert actual[0].settings == {"g": 0.0, "tau": 0.7}


@pytest.mark.parametrize("hard", [False, True])
def test_prior_only_samples_prior_without_penalty(
    hard: bool, toy: Any, build: Callable[..., Any], naive_network: Network
) -> None:
    space = build(PriorOnlySpace(**SIZE, tau=Exponential(1.0, 0.25), hard=hard), toy)
    torch.manual_seed(11)
    terms = space.training_terms(toy.states, toy.score, 0.5)
    torch.manual_seed(11)
    weights = softmax((softmax(naive_network(space.prior, toy.states.prompt)).log() + noise()) / 0.5)
    z = (hardened(weights) if hard else weights) @ space.codebook.weight
    assert_same_loss_and_gradients(total(terms), toy.naive_losses(z).mean(), space, toy)
    assert not hasattr(space, "posterior")
    assert terms.penalty == 0
    assert terms.kl is None
    assert terms.settings == {"tau": 0.5}
