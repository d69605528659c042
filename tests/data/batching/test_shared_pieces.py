"""Tests of batches in which several pairs have the same prompt or answer: the values are those of separate pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpc_lightning.data.batching.layouts import FixedShapesLayout, Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.data.batching.shapes import BatchShape, ShapePlan
from lpc_lightning.policy import CausalPolicy, logprobs
from lpc_lightning.types import PreferenceBatch, TokenizedPair
from tests.data.batching.test_layouts import PAD, check
from tests.fixtures.policies import piece_table

PROMPTS = ([5, 6, 7, 8, 9], [5, 6, 7], [11])
ANSWERS = ([20, 21, 22, 23], [20, 21, 4], [30], [31, 32, 33, 34, 35, 36, 37])
RANKING = [
    TokenizedPair(str(number), PROMPTS[0], chosen, rejected)
    for number, (chosen, rejected) in enumerate(itertools.combinations(ANSWERS, 2))
]
"""The six pairs of four ranked answers."""
MIXED = [
    *RANKING[:3],
    TokenizedPair("other prompt", PROMPTS[1], ANSWERS[0], ANSWERS[3]),
    TokenizedPair("opposite label", PROMPTS[0], ANSWERS[1], ANSWERS[0]),
    TokenizedPair("the same again", PROMPTS[1], ANSWERS[0], ANSWERS[3]),
    TokenizedPair("alone", PROMPTS[2], ANSWERS[2], ANSWERS[1]),
]
LAYOUTS: dict[str, Layout] = {
    "padded": PaddedLayout(PAD),
    "one row": SharedPrefixLayout(PAD, None),
    "rows of a pair": SharedPrefixLayout(PAD, 1),
    "rows of 24": SharedPrefixLayout(PAD, 24),
    "fixed shapes": FixedShapesLayout(PAD, None, ShapePlan((BatchShape(1, 96, 64),))),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
pairs_of_few_pieces = st.lists(
    st.builds(
        lambda number, prompt, answers: TokenizedPair(str(number), prompt, *answers),
        st.integers(),
        st.sampled_from(PROMPTS),
        st.permutations(ANSWERS).map(lambda answers: answers[:2]),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(pairs=pairs_of_few_pieces, row_tokens=st.none() | st.integers(1, 60), padded=st.booleans())
def test_every_read_sees_its_own_prefix(pairs: list[TokenizedPair], row_tokens: int | None, padded: bool) -> None:
    layout = PaddedLayout(PAD) if padded else SharedPrefixLayout(PAD, row_tokens)
    batch = layout(pairs)
    check(batch, pairs)
    if not padded and row_tokens is not None:
        longest = max(len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
        assert batch.input_ids.shape[1] <= max(row_tokens, longest)


@pytest.mark.parametrize(
    ("layout", "tokens"), [(PaddedLayout(PAD), 4 * 5 + 15), (SharedPrefixLayout(PAD, None), 5 + 15)]
)
def test_ranking_has_each_answer_once(layout: Layout, tokens: int) -> None:
    batch = layout(RANKING)
    assert batch.tokens == tokens
    assert batch.lengths.sum() == 3 * 15, "of the pairs, each answer is in three"


@settings(deadline=None, max_examples=60)
@given(pairs=pairs_of_few_pieces, row_tokens=st.none() | st.integers(1, 60))
def test_planned_shapes_know_shared_pieces(pairs: list[TokenizedPair], row_tokens: int | None) -> None:
    """The plan needs no tokens: the only planned shape is that of the batch, rounded up."""
    layout = FixedShapesLayout(PAD, row_tokens).for_batches([piece_table(pairs)])
    batch = layout(pairs)
    assert batch.planned
    needed = FixedShapesLayout(PAD, row_tokens, ShapePlan((BatchShape(99, 9999, 9999),)))(pairs).attention_mask
    width, rows = int(needed.sum(1).max()), int((needed.sum(1) > 0).sum())
    assert batch.input_ids.shape == (rows, -(-width // 32) * 32)


def values(policy: CausalPolicy, batches: Sequence[PreferenceBatch], codes: Tensor) -> list[Tensor]:
    """Return all that a loss may read of batches, each with pairs on its first axis, and gradients of the weights.

    The gradients are those of a sum over pairs. The mean token is that of all batches.
    """
    policy.zero_grad()
    found: list[list[Tensor]] = []
    tokens = torch.tensor([int(batch.lengths.sum()) for batch in batches], dtype=torch.float64)
    means = []
    for batch in batches:
        forward = policy(batch)
        number = batch.pairs
        under = codes[torch.tensor([sum(map(ord, name)) for name in batch.ids]) % len(codes)]
        by_answer = [forward.logps(), forward.logps_per_code(codes), forward.logps(under), *forward.first_order()]
        states = [forward.states.prompt, forward.states.chosen, forward.states.rejected]
        differentiable = [*by_answer[:3], *states]
        torch.stack([value.sin().sum() for value in differentiable]).sum().backward()
        means.append(forward.mean_token())
        found.append([*(value.unflatten(0, (2, number)).movedim(0, 1) for value in by_answer), *states])
    mean = (torch.stack(means) + (tokens / tokens.sum()).log()[:, None]).logsumexp(0)
    gradients = [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]
    return [*(torch.cat(values) for values in zip(*found, strict=True)), mean, *gradients]


@every_layout
@pytest.mark.parametrize("pairs", [RANKING, MIXED], ids=["ranking", "mixed"])
@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_values_equal_those_of_separate_pairs(
    layout: Layout, pairs: list[TokenizedPair], attention: str, tiny: Callable[..., CausalPolicy]
) -> None:
    """Log-probabilities, states, gradients with respect to z and to the weights, in float64."""
    policy = tiny("llama", attention=attention)
    codes = torch.randn(3, policy.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = values(policy, [PaddedLayout(PAD)([pair]) for pair in pairs], codes)
    for ours, theirs in zip(values(policy, [layout(pairs)], codes), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_values_equal_naive_values(tiny: Callable[..., CausalPolicy], naive_logps: Callable[..., Tensor]) -> None:
    policy = tiny("llama", attention="sdpa")
    with torch.no_grad():
        expected = naive_logps(policy.causal_lm, MIXED)
        torch.testing.assert_close(policy(SharedPrefixLayout(PAD, None)(MIXED)).logps(), expected)


def test_shared_tokens_are_scored_once(tiny: Callable[..., CausalPolicy], monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's products are most of the work above few layers."""
    policy = tiny("llama", attention="sdpa")
    forward = policy(SharedPrefixLayout(PAD, None)(RANKING))
    product, rows = logprobs._product, 0

    def counted(left: Tensor, right: Tensor) -> Tensor:
        nonlocal rows
        rows += len(left)
        return product(left, right)

    monkeypatch.setattr(logprobs, "_product", counted)
    z = 0.1 * torch.arange(6.0, dtype=torch.float64)[:, None].expand(-1, policy.width)
    forward.logps()
    forward.logps_per_code(z[:2])
    with torch.no_grad():
        forward.logps(z)
        forward.logps(torch.zeros_like(z))
        forward.logps(z[:2].repeat_interleave(3, 0))  # pairs of the first answer, and the others
    forward.logps(z.clone().requires_grad_())
    # The first two answers begin with the same two tokens. Their first token is predicted at one position.
    assert rows == 6 * 14, "separate pairs have 45 tokens"
