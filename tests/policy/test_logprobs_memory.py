"""Tests that a training step never holds all (N, V) logits, by the size of each tensor and of all live ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.live_memory import peak_bytes
from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import SharedPrefixLayout
from lpc_lightning.latent import GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import TinyPolicy, logprobs
from lpc_lightning.policy.logprobs import logits_of
from lpc_lightning.types import PreferenceBatch, TokenizedPair

VOCABULARY = 1024
CHUNK = 32
"""Tokens in a chunk."""
LATENTS: dict[str, Callable[[], LatentSpace] | None] = {
    "plain": None,
    "gumbel": lambda: GumbelSpace(num_codes=32, hidden=8, init_logit_std=0.1),
    "marginal": lambda: MarginalSpace(num_codes=32, hidden=8, init_logit_std=0.1),
}


class Largest(TorchDispatchMode):
    """Size of the largest output of all operations, and the name of its operation."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operation = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.numel() > self.elements:
                self.elements, self.operation = leaf.numel(), str(func)
        return out


@pytest.fixture(scope="module")
def batch(make_pairs: Callable[..., list[TokenizedPair]]) -> PreferenceBatch:
    """2000 answer tokens after short prompts."""
    return SharedPrefixLayout(0, None)(make_pairs([(5, 125, 125)] * 8))


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Callable[[PreferenceBatch], None]]:
    """Forward and backward pass of one training step. The module is built before."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", CHUNK * VOCABULARY)

    def of(latent: str, precision: str) -> Callable[[PreferenceBatch], None]:
        space = LATENTS[latent]
        policy = TinyPolicy(width=8, layers=1, heads=1, attention="segment")
        module = DPO(policy=policy, latent=space and space(), reference="live")
        module.configure_model()

        def run(batch: PreferenceBatch) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                forward, score = module.score_batch(batch)
                terms = module.training_terms(forward.states, score, 0.5)
            (terms.pairs.losses + terms.penalty).mean().backward()
            module.zero_grad()

        return run

    return of


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("latent", LATENTS)
def test_step_never_holds_all_logits(
    latent: str, precision: str, step: Callable[..., Any], batch: PreferenceBatch
) -> None:
    run = step(latent, precision)
    run(batch)  # allocates what is allocated only once
    logits = len(batch.targets) * VOCABULARY
    with Largest() as largest:
        run(batch)
    assert largest.elements <= 4 * CHUNK * VOCABULARY, largest.operation
    assert largest.elements >= CHUNK * VOCABULARY, "no operation of the head was recorded"
    # All live tensors are less than half of (N, V) in float32. Most are the backbone's.
    assert peak_bytes(lambda: run(batch)) < 4 * logits / 2


@pytest.mark.slow
def test_memory_grows_with_chunk_size(
    step: Callable[..., Any], make_pairs: Callable[..., list[TokenizedPair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = step("marginal", "32-true")
    some, more = (SharedPrefixLayout(0, None)(make_pairs([(5, 125, 125)] * pairs)) for pairs in (4, 8))
    run(some)
    peaks = [peak_bytes(lambda batch=batch: run(batch)) for batch in (some, more)]
    assert peaks[1] - peaks[0] < 4 * 1000 * VOCABULARY / 3, "1000 more tokens need states, not logits"
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2000 * VOCABULARY)
    assert peak_bytes(lambda: run(more)) > 2 * 4 * 2000 * VOCABULARY, "one chunk of all tokens is measured"


def test_accounting_counts_held_logits(batch: PreferenceBatch) -> None:
    """Measure naive logits in the forward pass, and in the backward pass, which holds two copies."""
    policy = TinyPolicy(width=8, layers=1, heads=1, attention="segment").build()

    def naive() -> None:
        logits = logits_of(policy.hidden(batch)[batch.read_at], policy.head)
        logits.log_softmax(-1).gather(1, batch.targets[:, None]).sum().backward()

    naive()
    logits = len(batch.targets) * VOCABULARY
    with Largest() as largest:
        naive()
    assert largest.elements == logits
    assert peak_bytes(naive) > 2 * 4 * logits
