"""Tests of the z of a context: equal to the prior's, and in mode `sample`, one draw per context."""

from __future__ import annotations

import pytest
import torch

from lpc_lightning.evaluation.benchmarks.context_latent import ContextLatent
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.seeding import derive

WIDTH, CODES = 6, 4


def make_prior(kind: str) -> InferencePrior:
    generator = torch.Generator().manual_seed(0)
    outputs = {"discrete": CODES, "gaussian": 2 * CODES}[kind]
    sizes = {
        "codebook": (CODES, WIDTH),
        "prior.first.weight": (5, WIDTH),
        "prior.first.bias": (5,),
        "prior.second.weight": (outputs, 5),
        "prior.second.bias": (outputs,),
    }
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return InferencePrior.of({"kind": kind, "num_codes": CODES, "prior_mode": "argmax"}, tensors)


CONTEXTS = [[1, 2, 3], [4], [1, 2], [9, 9, 9, 9]]
STATES = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["mean", "argmax", 2])
def test_z_of_deterministic_modes_equals_prior(mode: str | int) -> None:
    latent = ContextLatent(make_prior("discrete"), mode, seed=0)
    assert not latent.is_random
    assert torch.equal(latent(STATES, CONTEXTS), make_prior("discrete")(STATES, mode))


def test_mode_defaults_to_prior_setting() -> None:
    assert ContextLatent(make_prior("discrete"), None, seed=0).mode == "argmax"


@pytest.mark.parametrize("kind", ["discrete", "gaussian"])
def test_sample_depends_on_its_context_only(kind: str) -> None:
    prior = make_prior(kind)
    latent = ContextLatent(prior, "sample", seed=3)
    together = latent(STATES, CONTEXTS)
    for number, context in enumerate(CONTEXTS):
        torch.manual_seed(derive(3, *context))
        assert torch.equal(together[number], prior(STATES[number : number + 1], "sample")[0])
    order = [2, 0, 3, 1]
    assert torch.equal(latent(STATES[order], [CONTEXTS[number] for number in order]), together[order])
    assert torch.equal(latent(STATES[:1].expand(2, -1), [[1, 2, 3]] * 2), together[:1].expand(2, -1))


@pytest.mark.slow
def test_samples_follow_the_prior() -> None:
    prior = make_prior("discrete")
    state = STATES[:1]
    shares = prior.log_prior(state)[0].exp()
    draws = 4000
    contexts = [[number] for number in range(draws)]
    samples = ContextLatent(prior, "sample", 0)(state.expand(draws, -1), contexts)
    codes = torch.cdist(samples, prior.codebook).argmin(-1)
    actual = torch.bincount(codes, minlength=CODES) / draws
    assert (actual - shares).abs().max() < 4 * (shares * (1 - shares) / draws).sqrt().max()
    again = ContextLatent(prior, "sample", 1)(state.expand(draws, -1), contexts)
    same = (codes == torch.cdist(again, prior.codebook).argmin(-1)).float().mean()
    assert abs(same - shares.square().sum()) < 0.05, "another seed must give independent draws"


def test_sampling_keeps_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ContextLatent(make_prior("gaussian"), "sample", seed=3)(STATES, CONTEXTS)
    assert torch.equal(torch.get_rng_state(), before)
