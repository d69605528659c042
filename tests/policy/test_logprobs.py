"""Tests of chunked log-probabilities and their gradients against a plain float64 log-softmax."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lpc_lightning.policy.logprobs import (
    code_logits,
    code_range,
    logits_of,
    token_logps,
    token_logps_and_greedy,
    token_logps_of_groups,
    token_logps_per_code,
)
from lpc_lightning.types import LogitHead
from tests.policy.logit_cases import HEADS, Case, assert_all_close, chunk, every_chunking, every_head, linear_head


@every_head
@every_chunking
def test_token_logps_equal_log_softmax(kind: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk(monkeypatch, tokens_at_once)
    case = Case(kind, codes=1)
    # The naive loop has one code. Here it is added to the states.
    ours = token_logps(case.hidden + case.codes[0], case.targets, case.head)[:, None]
    theirs = case.naive()
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_all_close(case.gradients(ours), case.gradients(theirs), 1e-12)


@every_head
@every_chunking
def test_logps_per_code_equal_separate_codes(kind: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk(monkeypatch, tokens_at_once)
    case = Case(kind)
    ours = token_logps_per_code(case.hidden, case.targets, case.head, case.codes)
    theirs = case.naive()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_all_close(case.gradients(ours), case.gradients(theirs), 1e-11)


@every_head
@every_chunking
def test_greedy_marks_largest_logits(kind: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk(monkeypatch, tokens_at_once)
    case = Case(kind, tokens=40, codes=1)
    hidden = case.hidden + case.codes[0]
    # Every second target is the likeliest token.
    likeliest = torch.stack([logits_of(state[None], case.head)[0].argsort()[-1] for state in hidden])
    case.targets = torch.where(torch.arange(40) % 2 == 0, likeliest, case.targets)
    logps, greedy = token_logps_and_greedy(hidden, case.targets, case.head)
    torch.testing.assert_close(logps, case.naive()[:, 0].detach(), rtol=1e-12, atol=1e-12)
    assert not logps.requires_grad
    others = [logits_of(state[None], case.head)[0].tolist() for state in hidden]
    expected = [row[target] == max(row) for row, target in zip(others, case.targets.tolist(), strict=True)]
    assert greedy.tolist() == expected
    assert 20 <= sum(expected) < 40


def test_greedy_takes_lowest_of_equal_logits() -> None:
    head = LogitHead(torch.tensor([[0.0], [1.0], [1.0]]))
    _, greedy = token_logps_and_greedy(torch.ones(2, 1), torch.tensor([1, 2]), head)
    assert greedy.tolist() == [True, False]


@every_head
def test_gradcheck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk(monkeypatch, 2)
    case = Case(kind, tokens=5, vocabulary=6, width=3, codes=2)

    def head(weight: Tensor, bias: Tensor | None = None) -> LogitHead:
        return replace(case.head, weight=weight, bias=bias)

    def per_code(hidden: Tensor, codes: Tensor, *rows: Tensor) -> Tensor:
        return token_logps_per_code(hidden, case.targets, head(*rows), codes)

    def plain(hidden: Tensor, *rows: Tensor) -> Tensor:
        return token_logps(hidden, case.targets, head(*rows))

    assert torch.autograd.gradcheck(per_code, case.leaves)
    assert torch.autograd.gradcheck(plain, [case.hidden, *case.leaves[2:]])


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.integers(2, 12),
    codes=st.integers(1, 5),
    tokens_at_once=st.integers(1, 10),
    kind=st.sampled_from(list(HEADS)),
    seed=st.integers(0, 2**16),
)
def test_logps_per_code_for_all_shapes_and_chunks(
    tokens: int, vocabulary: int, codes: int, tokens_at_once: int, kind: str, seed: int
) -> None:
    case = Case(kind, tokens, vocabulary, codes=codes, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        chunk(patch, tokens_at_once, vocabulary)
        ours = token_logps_per_code(case.hidden, case.targets, case.head, case.codes)
        gradients = case.gradients(ours)
    theirs = case.naive()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert_all_close(gradients, case.gradients(theirs), 1e-9)


@pytest.mark.parametrize("frozen", ["weight", "hidden", "codes", "bias"])
def test_frozen_input_gets_no_gradient(frozen: str) -> None:
    case, same = Case("bias"), Case("bias")
    held = {"weight": case.head.weight, "hidden": case.hidden, "codes": case.codes, "bias": case.head.bias}[frozen]
    held.requires_grad_(False)
    (case.weights * token_logps_per_code(case.hidden, case.targets, case.head, case.codes)).sum().backward()
    assert held.grad is None
    expected = same.gradients(same.naive())
    for leaf, theirs in zip(case.leaves, expected, strict=True):
        if leaf is not held:
            torch.testing.assert_close(leaf.grad, theirs, rtol=1e-11, atol=1e-11)


@every_head
@every_chunking
def test_frozen_head_under_z(kind: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the states have a gradient. z of two groups is added to them."""
    chunk(monkeypatch, tokens_at_once)
    case, same = Case(kind), Case(kind)
    group, z = torch.arange(7) % 2, case.codes[:2].detach()
    for leaf in case.leaves[2:]:
        leaf.requires_grad_(False)
    ours = token_logps(case.hidden, case.targets, case.head, z, group)
    theirs = same.naive()[torch.arange(7), group]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    upstream = case.weights[:, 0]
    for held, other in zip((ours, 2 * ours), (theirs, 2 * theirs), strict=True):
        (gradient,) = torch.autograd.grad(held, case.hidden, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad(other, same.hidden, upstream, retain_graph=True)
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "products"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 3)])
def test_frozen_head_takes_two_products(dtype: torch.dtype, products: int) -> None:
    """With a loss scale, small gradients in float16 need its factor before they are rounded."""
    case = Case(tokens=8, vocabulary=64, width=16, dtype=dtype)
    case.head.weight.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        token_logps(case.hidden, case.targets, case.head).sum().backward()
    assert counter.get_total_flops() == products * 2 * 8 * 64 * 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_logps(case.hidden, case.targets, case.head)
    assert counter.get_total_flops() == 2 * 8 * 64 * 16


@linear_head
def test_code_logits_equal_logit_difference(kind: str) -> None:
    case = Case(kind)
    with_code = torch.stack([logits_of(case.hidden + code, case.head) for code in case.codes], dim=1)
    without = logits_of(case.hidden, case.head)[:, None]
    torch.testing.assert_close(with_code - without, code_logits(case.head, case.codes).expand(7, -1, -1))


@every_head
@every_chunking
@pytest.mark.parametrize(("code_scale", "least", "most"), [(0.7, 0, 60), (40.0, 60, 600), (800.0, 600, math.inf)])
@pytest.mark.parametrize("dense", [True, False])
def test_logps_of_groups_equal_separate_pairs(
    kind: str,
    tokens_at_once: int,
    code_scale: float,
    least: float,
    most: float,
    dense: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dense: all 28 pairs of 7 tokens and 4 codes, which costs more than 7 products and thin ones. Sparse: a few.

    Beyond 600 nats, the exponentials of thin products underflow.
    """
    chunk(monkeypatch, tokens_at_once)
    case = Case(kind, code_scale=code_scale / HEADS[kind].get("scale", 1.0))
    assert least < code_range(case.head, case.codes) < most
    token, group = torch.cartesian_prod(torch.arange(7), torch.arange(4)).T if dense else torch.arange(4).expand(2, -1)
    ours = token_logps_of_groups(case.hidden, case.targets, case.head, case.codes, token, group)
    theirs = case.naive()[token, group]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = case.weights[token, group]
    found, expected = (torch.autograd.grad((weights * logps).sum(), case.leaves) for logps in (ours, theirs))
    assert_all_close(found, expected, 1e-12)


def test_dense_groups_take_fewer_products() -> None:
    """Score 8 tokens under each of 16 representations: 128 products with the head, or 8 and 128 thin ones."""
    case = Case(tokens=8, vocabulary=64, width=256, codes=16, code_scale=0.01)
    token, group = torch.cartesian_prod(torch.arange(8), torch.arange(16)).T
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        token_logps_of_groups(case.hidden, case.targets, case.head, case.codes, token, group)
    of_codes = 2 * 16 * 256 * 64
    assert counter.get_total_flops() == of_codes + 2 * 8 * 64 * (256 + 16)
