"""No (N, V) logits are alive at once in a training step: the size of every tensor, and the sum of those alive."""

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
    """The largest tensor that any operation puts out, and whether a backward pass was among what it saw."""

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
    """2000 answer tokens behind short prompts."""
    return SharedPrefixLayout(0, None)(make_pairs([(5, 125, 125)] * 8))


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Callable[[PreferenceBatch], None]]:
    """Forward and backward of one training step, its module built before."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", CHUNK * VOCABULARY)

    def of(latent: str, precision: str) -> Callable[[PreferenceBatch], None]:
        space = LATENTS[latent]
        policy = TinyPolicy(width=8, layers=1, heads=1, attention="segment")
        module = DPO(policy=policy, latent=space and space(), reference="live")
        module.configure_model()

        def run(batch: PreferenceBatch) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                reading, score = module.read(batch)
                terms = module.training_terms(reading.states, score, 0.5)
            (terms.pairs.losses + terms.penalty).mean().backward()
            module.zero_grad()

        return run

    return of


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("latent", LATENTS)
def test_no_step_holds_the_logits_of_all_tokens(
    latent: str, precision: str, step: Callable[..., Any], batch: PreferenceBatch
) -> None:
    run = step(latent, precision)
    run(batch)  # what is allocated once, and no more
    logits = len(batch.targets) * VOCABULARY
    with Largest() as largest:
        run(batch)
    assert largest.elements <= 4 * CHUNK * VOCABULARY, largest.operation
    assert largest.elements >= CHUNK * VOCABULARY, "the head was not seen"
    # All that is alive at once is less than half of (N, V) in float32, and most of it the backbone's.
    assert peak_bytes(lambda: run(batch)) < 4 * logits / 2


def test_memory_follows_the_chunk_and_not_the_tokens(
    step: Callable[..., Any], make_pairs: Callable[..., list[TokenizedPair]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = step("marginal", "32-true")
    some, more = (SharedPrefixLayout(0, None)(make_pairs([(5, 125, 125)] * pairs)) for pairs in (4, 8))
    run(some)
    peaks = [peak_bytes(lambda batch=batch: run(batch)) for batch in (some, more)]
    assert peaks[1] - peaks[0] < 4 * 1000 * VOCABULARY / 3, "1000 tokens more cost the backbone's states, not logits"
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 2000 * VOCABULARY)
    assert peak_bytes(lambda: run(more)) > 2 * 4 * 2000 * VOCABULARY, "one chunk of all tokens shows"


def test_the_accounting_sees_logits_that_are_held(batch: PreferenceBatch) -> None:
    """In forward and in backward, where there are two of them."""
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
