"""Tests that all paths give the same step: layouts, head chunks, references, kernels, compiled or recomputed layers.

One step of each algorithm and latent is computed along the plain path and along every other one. Loss and gradients
agree to 1e-9 in float64 and 1e-4 in float32. Tests of the plain path itself are in test_plain_steps, test_against_trl
and test_causal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms import DPO, IPO, PreferenceModule, SimPO
from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import logprobs
from lpc_lightning.types import TokenizedPair

LENGTHS = [(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5), (1, 6, 1), (17, 2, 11)]
STEPS: dict[str, tuple[type[PreferenceModule], Callable[[], LatentSpace] | None]] = {
    "DPO": (DPO, None),
    "DPO gumbel": (DPO, lambda: GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0)),
    "DPO marginal": (DPO, lambda: MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0)),
    "SimPO": (SimPO, None),
    "IPO": (IPO, None),
    "IPO gumbel": (IPO, lambda: GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0)),
    "SimPO marginal": (SimPO, lambda: MarginalSpace(num_codes=4, hidden=8, init_logit_std=1.0)),
}


@dataclass(frozen=True)
class ComputePath:
    """Settings of a path. The default is the plain path."""

    layout: Layout = field(default_factory=lambda: PaddedLayout(0))
    reference: str = "live"
    tokens_at_once: int | None = None
    """Tokens in a chunk of the head. None: all tokens."""
    policy: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    float64: float | None = 1e-9
    """Tolerance in float64. None: the path does not run in float64."""
    float32: float = 1e-4


ONE_ROW, SOME_ROWS, ROW_A_PAIR = (SharedPrefixLayout(0, tokens) for tokens in (None, 40, 1))
SEGMENT, EAGER = {"attention": "segment"}, {"attention": "eager"}
PATHS = {
    "shared prefix, all pairs in a row": ComputePath(ONE_ROW),
    "shared prefix, several pairs in each of several rows": ComputePath(SOME_ROWS),
    "shared prefix, rows of the longest pair": ComputePath(ROW_A_PAIR),
    "head token by token": ComputePath(tokens_at_once=1),
    "head in chunks": ComputePath(tokens_at_once=7),
    "cached reference": ComputePath(reference="cached"),
    "eager": ComputePath(policy=EAGER, float64=1e-5),  # transformers computes the softmax in float32
    "eager, packed": ComputePath(SOME_ROWS, policy=EAGER, float64=1e-5),
    "segment, padded": ComputePath(policy=SEGMENT),
    "segment, packed": ComputePath(SOME_ROWS, policy=SEGMENT),
    "layers recomputed": ComputePath(policy={"gradient_checkpointing": True}),
    "layers recomputed, segment": ComputePath(ONE_ROW, policy=SEGMENT | {"gradient_checkpointing": True}),
    "compiled": ComputePath(compiled=True, float64=None),
    "compiled, packed": ComputePath(SOME_ROWS, compiled=True, float64=None),
    "settings of a CPU": ComputePath(ONE_ROW, reference="cached", tokens_at_once=16, policy=SEGMENT),
    "settings of a GPU": ComputePath(
        SOME_ROWS, reference="cached", tokens_at_once=16, policy={"gradient_checkpointing": True}
    ),
}
pytestmark = [
    # torch's own compiler.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Step(NamedTuple):
    """Result of a path."""

    loss: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def pairs(make_pairs: Callable[..., list[TokenizedPair]]) -> list[TokenizedPair]:
    return make_pairs(LENGTHS)


@pytest.fixture(scope="module")
def build(tiny_spec: Callable[..., Any], exact: Any, perturb: Any) -> Callable[..., PreferenceModule]:
    """Return a function that builds a module and its reference's values. Every call gives the same module."""

    def module(step: str, path: ComputePath, dtype: str, batch: Any, **size: Any) -> tuple[PreferenceModule, Tensor]:
        kind, latent = STEPS[step]
        torch.manual_seed(5)
        options: dict[str, Any] = {"attention": "sdpa", "context": 128}
        options |= path.policy | size
        live = {"reference": path.reference} if kind.needs_reference else {}
        made = kind(policy=tiny_spec("llama", dtype=dtype, **options), latent=latent and latent(), **live)
        made.configure_model()
        if made.latent is not None:
            made.latent.to(getattr(torch, dtype))
        policies = [made.policy, *([made.reference.policy] if path.reference == "live" and made.reference else [])]
        for policy in policies:
            if dtype == "float64":
                exact(policy)
            if path.compiled:
                policy.compile_layers("aot_eager")
        published = made.policy.reference_logps(batch)
        perturb(made.policy, deviation=0.1)
        if made.latent is not None:  # networks start with a layer of zeros, which blocks the gradient
            perturb(made.latent, deviation=0.1)
        return made, published

    return module


def terms_of(made: PreferenceModule, batch: Any) -> Any:
    """Compute the terms of a training step half way through a run, with the same noise for all paths."""
    torch.manual_seed(3)
    forward, score = made.score_batch(batch)
    return made.training_terms(forward.states, score, 0.5)


def compute_step(
    build: Callable[..., Any], step: str, path: ComputePath, dtype: str, pairs: list[TokenizedPair]
) -> Step:
    with pytest.MonkeyPatch.context() as patch:
        if path.tokens_at_once is not None:
            patch.setattr(logprobs, "CHUNK_ELEMENTS", path.tokens_at_once * 1024)
        # The cache is filled with its own batches, here padded ones.
        made, published = build(step, path, dtype, PaddedLayout(0)(pairs))
        if path.reference == "cached":
            values = published.double().view(2, -1).T.tolist()
            pairs = [replace(pair, reference_logps=tuple(both)) for pair, both in zip(pairs, values, strict=True)]
        terms = terms_of(made, path.layout(pairs))
        loss = (terms.pairs.losses + terms.penalty).mean()
        loss.backward()
    named = made.named_parameters()
    return Step(loss.detach(), {name: value.grad for name, value in named if value.grad is not None})


@pytest.fixture(scope="module")
def plainest(build: Callable[..., Any], pairs: list[TokenizedPair]) -> Callable[[str, str], Step]:
    """Return a function that computes the plain path once and then reuses it."""
    steps: dict[tuple[str, str], Step] = {}

    def step(name: str, dtype: str) -> Step:
        if (name, dtype) not in steps:
            steps[name, dtype] = compute_step(build, name, ComputePath(), dtype, pairs)
        return steps[name, dtype]

    return step


CASES = [
    pytest.param(step, name, dtype, id=f"{step}-{name}-{dtype}")
    for step in STEPS
    for name, path in PATHS.items()
    for dtype in ("float64", "float32")
    if getattr(path, dtype) is not None and (STEPS[step][0].needs_reference or name != "cached reference")
]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "name", "dtype"), CASES)
def test_every_path_gives_the_same_step(
    step: str,
    name: str,
    dtype: str,
    build: Callable[..., Any],
    plainest: Callable[[str, str], Step],
    pairs: list[TokenizedPair],
) -> None:
    expected, actual = plainest(step, dtype), compute_step(build, step, PATHS[name], dtype, pairs)
    tolerance = getattr(PATHS[name], dtype)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=tolerance, atol=tolerance)
    assert actual.loss.dtype == getattr(torch, dtype)
    assert actual.gradients.keys() == expected.gradients.keys()
    assert any(name.startswith("latent.") for name in actual.gradients) == (STEPS[step][1] is not None)
    for weight, gradient in expected.gradients.items():
        scale = float(gradient.abs().max())
        assert scale > 0, weight
        assert (actual.gradients[weight] - gradient).abs().max() <= tolerance * scale, weight


def test_cases_have_distinct_losses_and_shapes(
    plainest: Callable[[str, str], Step], pairs: list[TokenizedPair]
) -> None:
    losses = [float(plainest(step, "float64").loss) for step in STEPS]
    assert len({round(loss, 4) for loss in losses}) == len(STEPS)
    shapes = {name: tuple(path.layout(pairs).input_ids.shape) for name, path in PATHS.items()}
    assert shapes["cached reference"][0] == 12
    assert shapes["shared prefix, all pairs in a row"][0] == 1
    assert shapes["shared prefix, several pairs in each of several rows"][0] in (2, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
@torch.compiler.set_stance("force_eager")  # the C++ code of torch's compiler does not compile here
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_flex_attention_gives_the_same_loss(step: str, build: Callable[..., Any], pairs: list[TokenizedPair]) -> None:
    """Compare losses only, because flex_attention has no backward pass on a CPU."""
    losses = []
    for kernel, layout in (("sdpa", PaddedLayout(0)), ("flex_attention", SOME_ROWS)):
        batch = layout(pairs)
        made, _ = build(step, ComputePath(policy={"attention": kernel}), "float32", batch, width=64)
        terms = terms_of(made, batch)
        losses.append((terms.pairs.losses + terms.penalty).mean())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
