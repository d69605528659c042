"""Scale of the codebook in logits, and the prior and posterior networks."""

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
PLAIN, STANDARDIZED = (NetworkSettings(8, False, standardize) for standardize in (False, True))
both = pytest.mark.parametrize("settings", [PLAIN, STANDARDIZED], ids=["plain", "standardized"])


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


def negative_scale() -> LogitHead:
    return replace(gpt2(), scale=-3.0)


def offset() -> LogitHead:
    """Head whose rows have a large common part, as in trained models. It shifts all logits equally."""
    head = gpt2()
    return LogitHead((head.weight + 5 * torch.randn(64)).detach())


def uneven() -> LogitHead:
    """Head whose rows and columns differ a lot in size."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(size, generator=generator) + 0.1 for size in (1024, 64))
    return LogitHead(torch.randn(1024, 64, generator=generator) * rows[:, None] * columns)


HEADS = [tied_llama, gpt2, scaled, negative_scale, offset, uneven]


@pytest.mark.parametrize("make", HEADS)
@pytest.mark.parametrize("init_logit_std", [0.1, 2.0])
def test_codebook_init_logit_std(make: Callable[[], LogitHead], init_logit_std: float) -> None:
    torch.manual_seed(1)
    head = make()
    torch.manual_seed(2)
    codes = Codebook(CODES, 64, init_logit_std, head).weight.detach()
    logits = head.scale * codes @ head.weight.detach().T
    deviations = logits.std(dim=-1, correction=0)
    # Each squared deviation is a quadratic form in 64 normals: its mean is init_logit_std^2, up to sampling error.
    squares = deviations.square()
    error = squares.std() / CODES**0.5
    assert error < 0.02 * init_logit_std**2
    assert (squares.mean() - init_logit_std**2).abs() < 4 * error
    assert deviations.mean().item() == pytest.approx(init_logit_std, rel=0.02)


def test_state_deviation_is_covariance_trace() -> None:
    weight = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.25 * torch.cov(weight.T, correction=0).trace().sqrt()
    assert state_deviation(LogitHead(weight, scale=0.25)) == pytest.approx(expected.item(), rel=1e-12)
    assert state_deviation(LogitHead(weight + 1e3, scale=-0.25)) == pytest.approx(expected.item(), rel=1e-9)


def test_state_deviation_of_half_precision_head() -> None:
    weight = torch.randn(30_000, 8, generator=torch.Generator().manual_seed(0))
    full, half = (state_deviation(LogitHead(weight.to(dtype))) for dtype in (torch.float32, torch.float16))
    assert half == pytest.approx(full, rel=1e-3)


def test_codebook_with_zero_std_is_zero() -> None:
    codebook = Codebook(3, 64, 0.0, gpt2())
    assert torch.equal(codebook.weight, torch.zeros(3, 64))
    assert codebook.weight.requires_grad


def test_codebook_mixes_codes() -> None:
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
def test_networks_match_naive_network(
    outputs: int, settings: NetworkSettings, meet: Callable[..., None], naive_network: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    pairs = states()
    prior, posterior = (kind(6, outputs, settings).double() for kind in (Prior, Posterior))
    for network in (prior, posterior):
        meet(network)
    for ours, theirs in (
        (prior(pairs.prompt), naive_network(prior, pairs.prompt)),
        (posterior.logits(pairs), naive_network(posterior, pairs.chosen, pairs.rejected)),
    ):
        assert ours.shape == (5, outputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        leaves = [pairs.prompt, pairs.chosen, pairs.rejected, *prior.parameters(), *posterior.parameters()]
        gradients = [torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in (ours, theirs)]
        for actual, expected in zip(*gradients, strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_network_without_standardization_exact(dtype: torch.dtype, perturb: Callable[..., None]) -> None:
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
def test_network_ignores_scale_of_state(settings: NetworkSettings, perturb: Callable[..., None]) -> None:
    prior, pairs = Prior(6, 4, settings).double(), states()
    perturb(prior)
    torch.testing.assert_close(prior(100 * pairs.prompt), prior(pairs.prompt), rtol=1e-12, atol=1e-12)


@both
def test_posterior_depends_on_label(settings: NetworkSettings, perturb: Callable[..., None]) -> None:
    posterior, pairs = Posterior(6, 4, settings).double(), states()
    perturb(posterior)
    swapped = replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen)
    assert (posterior.logits(pairs) - posterior.logits(swapped)).abs().amax(-1).min() > 1e-3


@both
@pytest.mark.parametrize("kind", [Prior, Posterior])
def test_network_detach_stops_state_gradient(
    kind: Any, settings: NetworkSettings, perturb: Callable[..., None]
) -> None:
    for detach in (False, True):
        pairs = states()
        network = kind(6, 4, replace(settings, detach=detach)).double()
        perturb(network)
        inputs = [pairs.prompt] if kind is Prior else [pairs.chosen, pairs.rejected]
        (network(*inputs) ** 2).sum().backward()
        assert all((state.grad is None) == detach for state in inputs)
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())


@both
@pytest.mark.parametrize("kind", [Prior, Posterior])
def test_networks_start_at_zero(kind: Any, settings: NetworkSettings) -> None:
    network, pairs = kind(6, 4, settings).double(), states()
    inputs = [pairs.prompt] if kind is Prior else [pairs.chosen, pairs.rejected]
    assert not network(*inputs).any()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_network_dtype_under_autocast(
    dtype: torch.dtype, settings: NetworkSettings, perturb: Callable[..., None], meet: Callable[..., None]
) -> None:
    prior = Prior(6, 4, settings)
    perturb(prior)
    prompt = states().prompt.detach().to(dtype)
    meet(prior)
    expected = prior(prompt.float())
    with torch.autocast("cpu", torch.bfloat16):
        output = prior(prompt)
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


@both
def test_network_bfloat16_weights_sum_to_one(settings: NetworkSettings, perturb: Callable[..., None]) -> None:
    prior = Prior(6, 64, replace(settings, hidden=32)).bfloat16()
    perturb(prior)
    out = prior(states().prompt.detach().bfloat16())
    assert out.dtype == torch.float32
    total = out.log_softmax(-1).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(5), rtol=0, atol=1e-6)
