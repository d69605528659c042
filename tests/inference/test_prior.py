"""The exported prior against the spaces' own `infer`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.inference.opening import inference_prior
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
from lpc_lightning.latent.networks import StateNetwork
from lpc_lightning.types import LogitHead

WIDTH, CODES = 6, 4
CODED = {"num_codes": CODES, "hidden": 8}
DISCRETE = [GumbelSpace, ExpectedSpace, MarginalSpace, PriorOnlySpace, PosteriorOnlySpace]
MODES = ["mean", "sample", "argmax"]
CASES = [
    *((kind, CODED, mode) for kind in DISCRETE for mode in [None, *MODES, 0, CODES - 1]),
    *((MarginalSpace, CODED | {"prior_mode": mode}, None) for mode in ["sample", "argmax", 1]),
    *((GaussianSpace, CODED | {"prior_mode": own}, mode) for own in MODES[:2] for mode in [None, "mean", "sample"]),
    *((MLPSpace, {"hidden": 8}, mode) for mode in [None, *MODES]),
    *((VectorSpace, {"init_logit_std": 1.0}, mode) for mode in [None, *MODES]),
]


@pytest.fixture
def trained(perturb: Callable[..., None]) -> Callable[..., Any]:
    """A space that training has moved away from where it starts, its moments too, in eval mode."""

    def make(kind: type[LatentSpace], settings: dict[str, Any], dtype: torch.dtype = torch.float64) -> LatentSpace:
        torch.manual_seed(0)
        space = kind(**settings)
        space.build(WIDTH, LogitHead(torch.randn(13, WIDTH)))
        space.to(dtype)
        perturb(space, deviation=0.5)
        for network in space.modules():
            if isinstance(network, StateNetwork):
                network(*(3 + states(9, dtype) for _ in range(network.first.in_features // WIDTH)))
        space.update_moments()
        return space.eval()

    return make


def states(rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return 7 * torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("kind", "settings", "mode"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_z_is_what_the_space_infers(
    kind: type[LatentSpace], settings: dict[str, Any], mode: Any, dtype: torch.dtype, trained: Any
) -> None:
    """Up to rounding, random draws included: standardization is part of the first layer."""
    space = trained(kind, settings, dtype)
    prior = inference_prior(space)
    torch.manual_seed(2)
    expected = space.infer(states(dtype=dtype), mode)
    torch.manual_seed(2)
    found = prior(states(dtype=dtype), mode)
    assert found.dtype == expected.dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found.abs().min() > 0


@pytest.mark.parametrize("kind", [*DISCRETE, GaussianSpace, MLPSpace, VectorSpace])
def test_it_survives_its_files(kind: type[LatentSpace], trained: Any) -> None:
    space = trained(kind, {} if kind is VectorSpace else {"hidden": 8})
    prior = inference_prior(space)
    again = InferencePrior.of(json.loads(json.dumps(prior.settings)), prior.state_dict())
    assert torch.equal(again(states(), "mean"), prior(states(), "mean"))
    torch.testing.assert_close(again(states(), "mean"), space.infer(states(), "mean"))
    assert again.settings == prior.settings
    assert again.width == WIDTH


def test_its_tensors_are_its_own(trained: Any) -> None:
    space = trained(MarginalSpace, CODED)
    prior = inference_prior(space)
    before = prior(states())
    with torch.no_grad():
        for parameter in space.parameters():
            parameter.zero_()
    assert torch.equal(prior(states()), before)


def test_codes_and_log_prior(trained: Any) -> None:
    space = trained(MarginalSpace, CODED)
    prior = inference_prior(space)
    assert prior.num_codes == CODES
    assert torch.equal(prior.codebook, space.codebook.weight)
    torch.testing.assert_close(prior.log_prior(states()), space.log_prior(states()))
    for kind, settings in ((GaussianSpace, CODED), (MLPSpace, {}), (VectorSpace, {})):
        other = inference_prior(trained(kind, settings))
        assert other.num_codes is None
        assert other.log_prior(states()) is None


@pytest.mark.parametrize("kind", [MarginalSpace, GaussianSpace])
def test_weights_over_the_codes_replace_the_prior(kind: type[LatentSpace], trained: Any) -> None:
    space = trained(kind, CODED)
    prior = inference_prior(space)
    codebook = space.codebook.weight
    one = torch.tensor([0.5, 0.0, 2.0, -1.0])  # not normalized: used as they are
    each = torch.rand(5, CODES)
    torch.testing.assert_close(
        prior(states(), code_weights=one), torch.stack([0.5 * codebook[0] + 2 * codebook[2] - codebook[3]] * 5)
    )
    rows = [sum(each[row, code].double() * codebook[code] for code in range(CODES)) for row in range(5)]
    torch.testing.assert_close(prior(states(), code_weights=each), torch.stack(rows), rtol=1e-6, atol=1e-6)


def test_arithmetic_stays_outside_autocast(trained: Any) -> None:
    prior = inference_prior(trained(MarginalSpace, CODED, torch.float32))
    expected = prior(states(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prior(states(dtype=torch.float32)), expected)
        assert torch.equal(
            prior(states(dtype=torch.float32), code_weights=torch.ones(CODES)),
            prior.codebook.sum(0).expand(5, -1),
        )


REFUSED = [
    (
        MarginalSpace,
        {"mode": "median"},
        "prior_mode: found 'median', expected one of mean, sample, argmax, or the numb",
    ),
    (MarginalSpace, {"mode": CODES}, "prior_mode: found 4, expected .* a code from 0 to 3"),
    (MarginalSpace, {"mode": -1}, "prior_mode: found -1"),
    (MarginalSpace, {"mode": True}, "prior_mode: found True"),
    (GaussianSpace, {"mode": 1}, "prior_mode: found 1, expected mean or sample: a Gaussian latent has no codes"),
    (GaussianSpace, {"mode": "argmax"}, "prior_mode: found 'argmax'"),
    (MLPSpace, {"mode": 1}, "prior_mode: found 1, .* this latent has no codes"),
    (VectorSpace, {"mode": "x"}, "prior_mode: found 'x'"),
    (VectorSpace, {"code_weights": torch.ones(CODES)}, "code_weights: a latent of kind vector has no codebook"),
    (MLPSpace, {"code_weights": torch.ones(CODES)}, "code_weights: a latent of kind mlp has no codebook"),
    (MarginalSpace, {"code_weights": torch.ones(3)}, r"code_weights: found shape \(3,\), expected \(4,\)"),
    (MarginalSpace, {"code_weights": torch.ones(2, CODES)}, r"found shape \(2, 4\), expected .* or \(5, 4\)"),
    (MarginalSpace, {"mode": 1, "code_weights": torch.ones(CODES)}, "found both prior_mode and code_weights"),
]


@pytest.mark.parametrize(("kind", "requested", "output"), REFUSED)
def test_what_a_latent_does_not_have_is_refused(
    kind: type[LatentSpace], requested: Any, output: str, trained: Any
) -> None:
    prior = inference_prior(trained(kind, CODED if kind in (MarginalSpace, GaussianSpace) else {}))
    with pytest.raises(ValueError, match=output):
        prior(states(), **requested)


def test_files_that_are_not_of_its_kind_are_refused(trained: Any) -> None:
    prior = inference_prior(trained(MarginalSpace, CODED))
    tensors = prior.state_dict()
    with pytest.raises(ValueError, match="latent: found kind 'flow', expected one of discrete, gaussian, mlp, vector"):
        InferencePrior.of({"kind": "flow"}, tensors)
    with pytest.raises(ValueError, match=r"latent: found codebook, .*, expected 'vector' as well \(vector latent\)"):
        InferencePrior.of({"kind": "vector", "prior_mode": "mean"}, tensors)
    with pytest.raises(ValueError, match="latent: found extra, which a discrete latent does not have"):
        InferencePrior.of(prior.settings, tensors | {"extra": torch.ones(1)})
