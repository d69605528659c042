"""Controls that are not a mixture of codes, and properties of every space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import isabstract
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from lpc_lightning import latent
from lpc_lightning.latent import GaussianSpace, LatentSpace, MLPSpace, VectorSpace
from lpc_lightning.types import LogitHead
from tests.fixtures.spaces import SPACES, make_space

DISCRETE = {"num_codes": 3, "init_logit_std": 1.0, "hidden": 8}
every_space = pytest.mark.parametrize("name", list(SPACES))


def test_vector_same_z_for_all_prompts_and_modes(toy: Any, build: Callable[..., Any]) -> None:
    space = build(VectorSpace(), toy)
    z = space.vector.expand(4, -1)
    for mode in (None, "mean", "sample", "argmax"):
        assert torch.equal(space.infer(toy.states.prompt, mode), z)
    expected = toy.naive_losses(z)
    for terms in (space.training_terms(toy.states, toy.score, 0.5), space.inference_terms(toy.states, toy.score)):
        torch.testing.assert_close(terms.pairs.losses, expected, rtol=1e-11, atol=1e-11)
        assert terms.penalty == 0
        assert terms.prior is None
    (gradient,) = torch.autograd.grad(
        space.training_terms(toy.states, toy.score, 0.5).pairs.losses.mean(), space.vector
    )
    (by_loop,) = torch.autograd.grad(expected.mean(), space.vector)
    torch.testing.assert_close(gradient, by_loop, rtol=1e-10, atol=1e-11)


def test_vector_initial_scale() -> None:
    head = LogitHead(torch.randn(200, 400, generator=torch.Generator().manual_seed(0)) + 3)
    space = VectorSpace()
    space.build(400, head)
    assert torch.equal(space.vector, torch.zeros(400))
    deviations = []
    for seed in range(200):
        torch.manual_seed(seed)
        space = VectorSpace(init_logit_std=0.5)
        space.build(400, head)
        deviations.append((head.weight @ space.vector.detach()).std(correction=0))
    assert torch.stack(deviations).mean().item() == pytest.approx(0.5, rel=0.02)


def test_mlp_matches_naive_network(toy: Any, build: Callable[..., Any], naive_network: Callable[..., Tensor]) -> None:
    space = build(MLPSpace(hidden=8), toy)
    z = naive_network(space.network, toy.states.prompt)
    assert z.shape == (4, 6)
    for mode in (None, "mean", "sample", "argmax"):
        torch.testing.assert_close(space.infer(toy.states.prompt, mode), z, rtol=1e-12, atol=1e-12)
    terms = space.training_terms(toy.states, toy.score, 0.5)
    torch.testing.assert_close(terms.pairs.losses, toy.naive_losses(z), rtol=1e-11, atol=1e-11)
    assert terms.penalty == 0
    assert terms.kl is None


def test_mlp_starts_at_zero_with_gradient(dpo_toy: Any) -> None:
    space = MLPSpace(hidden=8)
    space.build(6, dpo_toy.head)
    space.double()
    assert torch.equal(space.infer(dpo_toy.states.prompt), torch.zeros(4, 6, dtype=torch.float64))
    space.training_terms(dpo_toy.states, dpo_toy.score, 0.0).pairs.losses.sum().backward()
    assert space.network.second.weight.grad.any()


@pytest.mark.parametrize(
    ("setting", "progress", "g"), [(None, 0.0, 0.0), (None, 0.25, 0.25), (0.6, 0.9, 0.6), (None, 1, 1)]
)
def test_gaussian_mixture_and_kl(
    setting: Any, progress: float, g: float, toy: Any, build: Callable[..., Any], naive_network: Callable[..., Tensor]
) -> None:
    space = build(GaussianSpace(**DISCRETE, g=setting, kl_weight=0.3), toy)
    torch.manual_seed(11)
    terms = space.training_terms(toy.states, toy.score, progress)
    states = toy.states
    p, q = naive_network(space.prior, states.prompt), naive_network(space.posterior, states.chosen, states.rejected)
    normal_p, normal_q = (Normal(out[:, :3], out[:, 3:].exp()) for out in (p, q))
    torch.manual_seed(11)
    noise_q, noise_p = (torch.randn(4, 3, dtype=torch.float64) for _ in range(2))
    weights = (1 - g) * (normal_q.mean + normal_q.stddev * noise_q) + g * (normal_p.mean + normal_p.stddev * noise_p)
    z = weights @ space.codebook.weight
    torch.testing.assert_close(terms.z, z, rtol=1e-11, atol=1e-11)
    kl = kl_divergence(Independent(normal_q, 1), Independent(normal_p, 1))
    torch.testing.assert_close(terms.kl, kl, rtol=1e-11, atol=1e-12)
    ours, theirs = (terms.pairs.losses + terms.penalty).mean(), (toy.naive_losses(z) + 0.3 * kl).mean()
    leaves = [toy.hidden, toy.weight, *space.parameters()]
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    assert terms.settings == {"g": g}


@pytest.mark.parametrize("contents", [(), ("x", "y", "x", "x")])
def test_gaussian_of_earlier_pairs(
    contents: tuple[str, ...], toy: Any, build: Callable[..., Any], naive_network: Callable[..., Tensor]
) -> None:
    """A pair reads no label of its own, of its copies, of later pairs and of others."""
    space = build(GaussianSpace(**DISCRETE, g=0.0, kl_weight=0.3, annotators=True), toy)
    states = replace(toy.states, annotators=("a", "b", "a", "a"), contents=contents)
    torch.manual_seed(11)
    terms = space.training_terms(states, toy.score, 0.5)
    torch.manual_seed(11)
    noise = torch.randn(4, 3, dtype=torch.float64)
    p, q = naive_network(space.prior, states.prompt), naive_network(space.posterior, states.chosen, states.rejected)
    # The third pair is a copy of the first one, and the fourth is one of both.
    given = [p[0], p[1], p[2] if contents else q[0], p[3] if contents else (q[0] + q[2]) / 2]
    used = torch.stack(given)
    z = (used[:, :3] + used[:, 3:].exp() * noise) @ space.codebook.weight
    torch.testing.assert_close(terms.z, z, rtol=1e-11, atol=1e-11)
    normal_p, normal_q = (Independent(Normal(out[:, :3], out[:, 3:].exp()), 1) for out in (p, used))
    kl = kl_divergence(normal_q, normal_p)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-11, atol=1e-12)
    ours, theirs = (terms.pairs.losses + terms.penalty).mean(), (toy.naive_losses(z) + 0.3 * kl).mean()
    leaves = [space.codebook.weight, *space.prior.parameters(), toy.hidden]
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_gaussian_without_a_known_annotator(toy: Any, build: Callable[..., Any]) -> None:
    """z is that of the prior, and every weight has a gradient, as DDP requires."""
    space = build(GaussianSpace(**DISCRETE, g=0.0, annotators=True), toy)
    losses = []
    for names in ((), ("",) * 4, ("a", "b", "c", "d")):
        torch.manual_seed(11)
        terms = space.training_terms(replace(toy.states, annotators=names), toy.score, 0.5)
        space.zero_grad()
        (terms.pairs.losses + terms.penalty).mean().backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in space.parameters())
        assert not any(parameter.grad.any() for parameter in space.posterior.parameters())
        losses.append(terms.pairs.losses)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[1], losses[2])


def test_gaussian_infer_by_mode(dpo_toy: Any, build: Callable[..., Any], naive_network: Callable[..., Tensor]) -> None:
    space = build(GaussianSpace(**DISCRETE), dpo_toy)
    prompt = dpo_toy.states.prompt.detach()
    out = naive_network(space.prior, prompt)
    mean = out[:, :3] @ space.codebook.weight
    torch.testing.assert_close(space.infer(prompt), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(space.infer(prompt, "mean"), mean, rtol=1e-12, atol=1e-12)
    torch.manual_seed(11)
    sample = space.infer(prompt, "sample")
    torch.manual_seed(11)
    weights = out[:, :3] + out[:, 3:].exp() * torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(sample, weights @ space.codebook.weight, rtol=1e-12, atol=1e-12)
    for mode in ("argmax", 0):
        with pytest.raises(
            ValueError, match=rf"latent\.prior_mode: found {mode!r}, expected mean or sample: a Gaussian"
        ):
            space.infer(prompt, mode)
        with pytest.raises(
            ValueError, match=rf"latent\.prior_mode: found {mode!r}, expected mean or sample: a Gaussian"
        ):
            GaussianSpace(**DISCRETE, prior_mode=mode)


@pytest.mark.parametrize("name", ["mlp", "vector"])
@pytest.mark.parametrize("mode", [3, 0, "code"])
def test_infer_unknown_mode_without_codes(name: str, mode: Any, dpo_toy: Any, build: Callable[..., Any]) -> None:
    space = build(make_space(name), dpo_toy)
    expected = (
        rf"latent\.prior_mode: found {mode!r}, expected one of mean, sample, argmax \(the same here\): this latent"
    )
    with pytest.raises(ValueError, match=expected):
        space.infer(dpo_toy.states.prompt, mode)


def test_table_of_spaces_is_complete() -> None:
    spaces = [space for space in vars(latent).values() if isinstance(space, type) and issubclass(space, LatentSpace)]
    assert {space for space, _ in SPACES.values()} == {space for space in spaces if not isabstract(space)}


@every_space
def test_state_dict_restores_space(name: str, toy: Any, build: Callable[..., Any]) -> None:
    first, second = (build(make_space(name), toy, seed=seed) for seed in (3, 4))
    prompt = toy.states.prompt

    def outputs(space: LatentSpace) -> list[Tensor]:
        torch.manual_seed(11)
        terms = space.training_terms(toy.states, toy.score, 0.5)
        return [space.infer(prompt), terms.pairs.losses + terms.penalty]

    assert not any(torch.equal(one, other) for one, other in zip(outputs(first), outputs(second), strict=True))
    assert set(first.state_dict()) == {own for own, _ in chain(first.named_parameters(), first.named_buffers())}
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(one, other) for one, other in zip(outputs(first), outputs(second), strict=True))


@every_space
@pytest.mark.parametrize("detach", [False, True])
def test_detach_stops_backbone_gradient(name: str, detach: bool, dpo_toy: Any, build: Callable[..., Any]) -> None:
    if name == "vector" and detach:
        with pytest.raises(TypeError):
            VectorSpace(detach=True)
        return
    space = build(make_space(name, detach=detach), dpo_toy)
    states = dpo_toy.separate_states()
    terms = space.training_terms(states, dpo_toy.score, 0.5)
    (terms.pairs.losses + terms.penalty).mean().backward()
    reads_prompt = name != "vector"
    reads_answers = hasattr(space, "posterior")
    for state, read in (
        (states.prompt, reads_prompt),
        (states.chosen, reads_answers),
        (states.rejected, reads_answers),
    ):
        has_gradient = state.grad is not None and bool(state.grad.any())
        assert has_gradient == (read and not detach)
    # The head reads other tensors, so its gradient is not stopped.
    assert dpo_toy.hidden.grad.any()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in space.parameters())


@every_space
def test_inference_terms_use_prompt_only(name: str, toy: Any, build: Callable[..., Any]) -> None:
    space = build(make_space(name), toy)
    states = toy.separate_states()
    without_answers = replace(states, chosen=states.chosen * torch.nan, rejected=states.rejected * torch.nan)
    terms = space.inference_terms(without_answers, toy.score)
    torch.testing.assert_close(
        terms.pairs.losses, toy.naive_losses(space.infer(toy.states.prompt)), rtol=1e-10, atol=1e-10
    )
    assert torch.isfinite(terms.pairs.losses).all()


@every_space
def test_inference_terms_depend_on_z(name: str, toy: Any, build: Callable[..., Any]) -> None:
    space = build(make_space(name), toy)
    plain, _ = toy.score.under(None)
    assert (space.inference_terms(toy.states, toy.score).pairs.losses - plain.losses).abs().max() > 1e-3
