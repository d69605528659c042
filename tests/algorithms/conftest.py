"""Pairs and layouts of whole training steps, and modules whose policy differs from their reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.latent import LatentSpace
from lpc_lightning.types import TokenizedPair
from tests.algorithms.naive_losses import ALGORITHMS

LENGTHS = [(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5)]
LAYOUTS: dict[str, Layout] = {"padded": PaddedLayout(0), "shared prefix": SharedPrefixLayout(0, row_tokens=40)}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
Make = Callable[..., PreferenceModule]


@pytest.fixture
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs(LENGTHS)


@pytest.fixture
def make(tiny_spec: Callable[..., Any], perturb: Callable[..., None]) -> Make:
    """Return a function that always builds the same module, whose policy differs from its reference."""

    def module(algorithm: str = "dpo", latent: LatentSpace | None = None, **policy: Any) -> PreferenceModule:
        kind, settings, *_ = ALGORITHMS[algorithm]
        torch.manual_seed(5)
        live = {"reference": "live"} if kind.needs_reference else {}
        made = kind(policy=tiny_spec("llama", **policy), latent=latent, **live, **settings)
        made.configure_model()
        if latent is not None and policy.get("dtype", "float64") == "float64":
            latent.double()
        trained = [parameter for parameter in made.policy.parameters() if parameter.requires_grad]
        perturb(torch.nn.ParameterList(trained), deviation=0.1)
        return made

    return module


@pytest.fixture(scope="session")
def once() -> Callable[[Any, Callable[[], Any]], Any]:
    """Return a function that computes the value of a key once, for all tests that compare with it."""
    values: dict[Any, Any] = {}

    def value(key: Any, compute: Callable[[], Any]) -> Any:
        if key not in values:
            values[key] = compute()
        return values[key]

    return value
