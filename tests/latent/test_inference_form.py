"""What is left of a space once training is over."""

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
CODED = {"codes": 3, "hidden": 4}
DISCRETE = [GumbelSpace, ExpectedSpace, MarginalSpace, PriorOnlySpace, PosteriorOnlySpace]
FORMS: list[tuple[LatentSpace, str, dict[str, Any], set[str]]] = [
    *(
        (kind(**CODED, prior_mode=mode), "discrete", {"codes": 3, "prior_mode": mode}, {"codebook", *PRIOR})
        for kind, mode in zip(DISCRETE, ("mean", "sample", "argmax", 2, 0), strict=True)
    ),
    (
        GaussianSpace(**CODED, prior_mode="sample"),
        "gaussian",
        {"codes": 3, "prior_mode": "sample"},
        {"codebook", *PRIOR},
    ),
    (MLPSpace(hidden=4), "mlp", {"prior_mode": "mean"}, {f"network.{name}" for name in NETWORK}),
    (VectorSpace(spread=1.0), "vector", {"prior_mode": "mean"}, {"vector"}),
]


@pytest.mark.parametrize(("space", "kind", "settings", "names"), FORMS, ids=lambda value: type(value).__name__)
def test_it_holds_what_the_prompt_needs_and_no_posterior(
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
