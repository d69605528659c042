"""The scale of the codebook in logits, and what the prior and posterior networks read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lpc_lightning.latent.networks import Codebook, NetworkSettings, Posterior, Prior, state_deviation
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.policy.head import head_of
from lpc_lightning.types import LogitHead, PairStates

CODES = 2000
PLAIN, STANDARDISED = (NetworkSettings(8, False, standardise) for standardise in (False, True))
both = pytest.mark.parametrize("settings", [PLAIN, STANDARDISED], ids=["plain", "standardised"])


def tied_llama() -> LogitHead:
    policy = TinyPolicy("llama", options={"tie_word_embeddings": True}).build()
    assert policy.head.weight is policy.causal_lm.get_input_embeddings().weight
    return policy.head


def gpt2() -> LogitHead:
    return TinyPolicy("gpt2").build().head


def scaled() -> LogitHead:
    size = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = AutoConfig.for_model("cohere", num_attention_heads=2, logit_scale=0.0625, **size)
    head = head_of(AutoModelForCausalLM.from_config(config))
    assert head.scale == 0.0625
    return head


def turned() -> LogitHead:
    return replace(gpt2(), scale=-3.0)


def offset() -> LogitHead:
    """All rows share a large part, as those of trained models do: it moves all logits alike."""
    head = gpt2()
    return LogitHead((head.weight + 5 * torch.randn(64)).detach())


def uneven() -> LogitHead:
    """Rows and columns of very different size."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(size, generator=generator) + 0.1 for size in (1024, 64))
    return LogitHead(torch.randn(1024, 64, generator=generator) * rows[:, None] * columns)


HEADS = [tied_llama, gpt2, scaled, turned, offset, uneven]


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("init_logit_std", [0.1, 2.0])
def test_codes_move_the_logits_by_the_spread(make: Callable[[], LogitHead], init_logit_std: float) -> None:
    torch.manual_seed(1)
    head = make()
    torch.manual_seed(2)
    codes = Codebook(CODES, 64, init_logit_std, head).weight.detach()
    logits = head.scale * codes @ head.weight.detach().T
    deviations = logits.std(dim=-1, correction=0)
    # Each squared deviation is a quadratic form in 64 normals: its mean is init_logit_std^2, up to their sampling
    # error.
    squares = deviations.square()
    error = squares.std() / CODES**0.5
    assert error < 0.02 * init_logit_std**2
    assert (squares.mean() - init_logit_std**2).abs() < 4 * error
    assert deviations.mean().item() == pytest.approx(init_logit_std, rel=0.02)


def test_the_deviation_of_a_head_is_the_trace_of_its_covariance() -> None:
    weight = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.25 * torch.cov(weight.T, correction=0).trace().sqrt()
    assert state_deviation(LogitHead(weight, scale=0.25)) == pytest.approx(expected.item(), rel=1e-12)
    assert state_deviation(LogitHead(weight + 1e3, scale=-0.25)) == pytest.approx(expected.item(), rel=1e-9)


def test_a_half_precision_head_is_measured_in_full_precision() -> None:
    weight = torch.randn(30_000, 8, generator=torch.Generator().manual_seed(0))
    full, half = (state_deviation(LogitHead(weight.to(dtype))) for dtype in (torch.float32, torch.float16))
    assert half == pytest.approx(full, rel=1e-3)


def test_a_spread_of_zero_is_a_codebook_of_zeros() -> None:
    codebook = Codebook(3, 64, 0.0, gpt2())
    assert torch.equal(codebook.weight, torch.zeros(3, 64))
    assert codebook.weight.requires_grad


def test_the_codebook_mixes_its_codes() -> None:
    codebook = Codebook(3, 64, 1.0, gpt2()).double()
    weights = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)
    mixed = [sum(weights[row, code] * codebook.weight[code] for code in range(3)) for row in range(2)]
    torch.testing.assert_close(codebook(weights), torch.stack(mixed), rtol=1e-13, atol=1e-13)


def states(pairs: int = 5, width: int = 6) -> PairStates:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(pairs, width, generator=generator, dtype=torch.float64) for _ in range(3))
    return PairStates(*(draw.requires_grad_() for draw in draws))


@both
@pytest.mark.parametrize("outputs", [1, 4])
def test_the_networks_are_two_layers_on_normalised_states(
    outputs: int, settings: NetworkSettings, meet: Callable[..., None], naive_network: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    seen = states()
    prior, posterior = (kind(6, outputs, settings).double() for kind in (Prior, Posterior))
    for network in (prior, posterior):
        meet(network)
    for ours, theirs in (
        (prior(seen.prompt), naive_network(prior, seen.prompt)),
        (posterior.of(seen), naive_network(posterior, seen.chosen, seen.rejected)),
    ):
        assert ours.shape == (5, outputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        leaves = [seen.prompt, seen.chosen, seen.rejected, *prior.parameters(), *posterior.parameters()]
        gradients = [torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in (ours, theirs)]
        for found, expected in zip(*gradients, strict=True):
            assert (found is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_not_standardised_it_is_the_two_layers_to_the_last_bit(
    dtype: torch.dtype, perturb: Callable[..., None]
) -> None:
    prior, prompt = Prior(6, 4, PLAIN).to(dtype), states().prompt.detach().to(dtype)
    perturb(prior)
    layers = nn.Sequential(nn.RMSNorm(6, elementwise_affine=False), prior.first, nn.GELU(), prior.second)
    exact = torch.promote_types(dtype, torch.float32)
    assert torch.equal(prior(prompt), layers(prompt).to(exact))
    assert torch.equal(prior.eval()(prompt), layers(prompt).to(exact))
    assert set(prior.state_dict()) == {
        f"{layer}.{name}" for layer in ("first", "second") for name in ("weight", "bias")
    }


@both
def test_the_scale_of_a_state_does_not_count(settings: NetworkSettings, perturb: Callable[..., None]) -> None:
    prior, seen = Prior(6, 4, settings).double(), states()
    perturb(prior)
    torch.testing.assert_close(prior(100 * seen.prompt), prior(seen.prompt), rtol=1e-12, atol=1e-12)


@both
def test_the_posterior_knows_which_answer_won(settings: NetworkSettings, perturb: Callable[..., None]) -> None:
    posterior, seen = Posterior(6, 4, settings).double(), states()
    perturb(posterior)
    turned_over = replace(seen, chosen=seen.rejected, rejected=seen.chosen)
    assert (posterior.of(seen) - posterior.of(turned_over)).abs().amax(-1).min() > 1e-3


@both
@pytest.mark.parametrize("kind", [Prior, Posterior])
def test_detach_cuts_the_states_off_and_nothing_else(
    kind: Any, settings: NetworkSettings, perturb: Callable[..., None]
) -> None:
    for detach in (False, True):
        seen = states()
        network = kind(6, 4, replace(settings, detach=detach)).double()
        perturb(network)
        inputs = [seen.prompt] if kind is Prior else [seen.chosen, seen.rejected]
        (network(*inputs) ** 2).sum().backward()
        assert all((state.grad is None) == detach for state in inputs)
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@both
@pytest.mark.parametrize("kind", [Prior, Posterior])
def test_the_networks_start_at_zero(kind: Any, settings: NetworkSettings) -> None:
    network, seen = kind(6, 4, settings).double(), states()
    inputs = [seen.prompt] if kind is Prior else [seen.chosen, seen.rejected]
    assert not network(*inputs).any()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_networks_work_in_the_type_of_their_weights_also_under_autocast(
    dtype: torch.dtype, settings: NetworkSettings, perturb: Callable[..., None], meet: Callable[..., None]
) -> None:
    prior = Prior(6, 4, settings)
    perturb(prior)
    seen = states().prompt.detach().to(dtype)
    meet(prior)
    expected = prior(seen.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = prior(seen)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@both
def test_a_distribution_from_bfloat16_weights_still_sums_to_one(
    settings: NetworkSettings, perturb: Callable[..., None]
) -> None:
    prior = Prior(6, 64, replace(settings, hidden=32)).bfloat16()
    perturb(prior)
    out = prior(states().prompt.detach().bfloat16())
    assert out.dtype == torch.float32
    total = out.log_softmax(-1).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(5), rtol=0, atol=1e-6)
