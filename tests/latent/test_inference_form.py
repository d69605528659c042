"""Inference form of each space."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lpc_lightning.latent import (
    ExpectedSpace,
    GaussianSpace,
    GumbelSpace,
    LatentSpace,
    MarginalSpace,
    MLPSpace,
    PosteriorOnlySpace,
    PriorOnlySpace,
    VectorSpace,
)

NETWORK = ("first.weight", "first.bias", "second.weight", "second.bias")
PRIOR = {f"prior.{name}" for name in NETWORK}
CODED: dict[str, Any] = {"num_codes": 3, "hidden": 4, "standardize": False}
DISCRETE = [GumbelSpace, ExpectedSpace, MarginalSpace, PriorOnlySpace, PosteriorOnlySpace]
FORMS: list[tuple[LatentSpace, str, dict[str, Any], set[str]]] = [
    *(
        (kind(**CODED, prior_mode=mode), "discrete", {"num_codes": 3, "prior_mode": mode}, {"codebook", *PRIOR})
        for kind, mode in zip(DISCRETE, ("mean", "sample", "argmax", 2, 0), strict=True)
    ),
    (
        GaussianSpace(**CODED, prior_mode="sample"),
        "gaussian",
        {"num_codes": 3, "prior_mode": "sample"},
        {"codebook", *PRIOR},
    ),
    (MLPSpace(hidden=4, standardize=False), "mlp", {"prior_mode": "mean"}, {f"network.{name}" for name in NETWORK}),
    (VectorSpace(init_logit_std=1.0), "vector", {"prior_mode": "mean"}, {"vector"}),
]


@pytest.mark.parametrize(("space", "kind", "settings", "names"), FORMS, ids=lambda value: type(value).__name__)
def test_inference_form_has_no_posterior(
    space: LatentSpace, kind: str, settings: dict[str, Any], names: set[str], dpo_toy: Any, build: Callable[..., Any]
) -> None:
    form = build(space, dpo_toy).inference_form()
    assert (form.kind, dict(form.settings), set(form.tensors)) == (kind, settings, names)
    assert json.loads(json.dumps(form.settings)) == settings
    weights = {name: p for name, p in space.named_parameters() if not name.startswith("posterior")}
    assert len(weights) == len(names)
    for name, tensor in form.tensors.items():
        own = weights["codebook.weight" if name == "codebook" else name]
        assert torch.equal(tensor, own)
        assert not tensor.requires_grad


@pytest.mark.parametrize(
    ("space", "network"), [(MarginalSpace(num_codes=3, hidden=4), "prior"), (MLPSpace(hidden=4), "network")]
)
@pytest.mark.parametrize("weights", [torch.float64, torch.bfloat16])
def test_inference_form_folds_standardization(
    space: LatentSpace, network: str, weights: torch.dtype, dpo_toy: Any, build: Callable[..., Any]
) -> None:
    """The folded tensors have the dtype of the moments, for any dtype of the weights."""
    build(space, dpo_toy).to(weights)
    form = space.inference_form()
    own = getattr(space, network)
    mean, deviation = own.moments.mean, own.moments.deviation
    assert deviation.max() < 0.95
    features = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (features - mean) / deviation @ own.first.weight.double().T + own.first.bias.double()
    tensors = {name.removeprefix(f"{network}."): tensor for name, tensor in form.tensors.items()}
    output = features @ tensors["first.weight"].T + tensors["first.bias"]
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for name in ("second.weight", "second.bias"):
        assert torch.equal(tensors[name], own.second.get_parameter(name.removeprefix("second.")).double())
    assert not any(tensor.requires_grad for tensor in tensors.values())


@pytest.mark.parametrize("space", [form[0] for form in FORMS], ids=lambda value: type(value).__name__)
def test_space_states_what_it_has(space: LatentSpace, dpo_toy: Any, build: Callable[..., Any]) -> None:
    """Other code reads `has_codes` and `num_codes`, never the class."""
    build(space, dpo_toy)
    states, score = dpo_toy.states, dpo_toy.score
    prior = space.log_prior(states.prompt)
    values = space.adaptation_values(states, score, score, score.swapped())
    assert space.has_codes == (prior is not None)
    assert (space.num_codes > 0) == bool(values)
    assert all(value.shape == (len(states.prompt), space.num_codes) for value in values.values())
    torch.manual_seed(0)
    if prior is None:
        expected = score.under(space.infer(states.prompt))[0].label_log_likelihood
    else:
        torch.testing.assert_close(space.mix(prior.exp()), prior.exp() @ space.codes)
        by_code = [dpo_toy.naive_losses(code.expand(len(prior), -1)) for code in space.codes]
        expected = (prior.exp() * (-torch.stack(by_code, dim=1)).exp()).sum(1).log()
    torch.manual_seed(0)  # the Gaussian draws its z
    torch.testing.assert_close(space.label_log_likelihood(states, score), expected)
