"""Tests of the sums by answer of a forward pass, of its first order in z, and of its mean token."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.policy import causal
from lpc_lightning.policy.causal import BatchForward
from lpc_lightning.policy.logprobs import logits_of
from tests.policy.logit_cases import Case, chunk, every_chunking, every_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_forward_sums_tokens(make_pairs: Callable[..., Any], dtype: torch.dtype) -> None:
    pairs = make_pairs([(3, 4, 2), (1, 1, 5), (2, 3, 1)], vocabulary=11)
    batch = PaddedLayout(pad_id=0)(pairs)
    case = Case("bias", tokens=batch.input_ids.numel(), codes=3, dtype=dtype)
    forward, z = BatchForward(case.hidden, batch, case.head), case.codes
    width = batch.input_ids.shape[1]
    expected_plain, expected_z = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    exact = case.in_float64()
    exact.hidden = exact.hidden.detach()
    for row in range(6):
        pair = pairs[row % 3]
        answer = pair.chosen_ids if row < 3 else pair.rejected_ids
        for place, token in enumerate(answer):
            state = exact.hidden[row * width + len(pair.prompt_ids) - 1 + place]
            for sums, extra in ((expected_plain, 0.0), (expected_z, exact.codes.detach()[row % 3])):
                logits = exact.head.weight.detach() @ (state + extra) + exact.head.bias.detach()
                sums[row] += logits.log_softmax(-1)[token]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(forward.logps().double(), expected_plain, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(forward.logps(z).double(), expected_z, rtol=tolerance, atol=tolerance)
    per_code = forward.logps_per_code(case.codes)
    by_hand = torch.stack([forward.logps(code.expand(3, -1)) for code in case.codes], dim=1)
    torch.testing.assert_close(per_code, by_hand, rtol=tolerance, atol=tolerance)

    for state, places in (
        (forward.states.prompt, [len(pair.prompt_ids) - 1 for pair in pairs]),
        (forward.states.chosen, [len(pair.prompt_ids) + len(pair.chosen_ids) - 1 for pair in pairs]),
    ):
        rows = [number * width + place for number, place in enumerate(places)]
        assert torch.equal(state, case.hidden[rows])
    ends = [len(pair.prompt_ids) + len(pair.rejected_ids) - 1 for pair in pairs]
    assert torch.equal(forward.states.rejected, case.hidden[[(3 + n) * width + end for n, end in enumerate(ends)]])


def forward_of(case: Case, make_pairs: Callable[..., Any]) -> BatchForward:
    """Make a forward pass of three pairs, from states that require gradients."""
    pairs = make_pairs([(3, 4, 2), (1, 1, 5), (2, 3, 1)], vocabulary=11)
    return BatchForward(case.hidden, PaddedLayout(pad_id=0)(pairs), case.head)


@every_head
@every_chunking
def test_first_order_is_gradient_at_zero(
    kind: str, tokens_at_once: int, make_pairs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk(monkeypatch, tokens_at_once)
    case = Case(kind, tokens=42)
    forward = forward_of(case, make_pairs)
    with torch.no_grad():
        plain, z_gradients = forward.first_order()
    assert not plain.requires_grad
    assert not z_gradients.requires_grad
    assert torch.equal(plain, forward.logps())
    z = torch.zeros(3, 5, dtype=torch.float64, requires_grad=True)
    logps = forward.logps(z)
    for answer in range(6):
        (gradient,) = torch.autograd.grad(logps[answer], z, retain_graph=True)
        torch.testing.assert_close(z_gradients[answer], gradient[answer % 3], rtol=1e-11, atol=1e-11)
    step = 1e-5
    with torch.no_grad():
        for axis in range(5):
            ahead = step * torch.eye(5, dtype=torch.float64)[axis].expand(3, -1)
            slope = (forward.logps(ahead) - forward.logps(-ahead)) / (2 * step)
            torch.testing.assert_close(z_gradients[:, axis], slope, rtol=1e-7, atol=1e-7)


def test_first_order_leaves_no_gradients(make_pairs: Callable[..., Any]) -> None:
    case = Case("bias", tokens=42)
    forward_of(case, make_pairs).first_order()
    assert all(leaf.grad is None for leaf in case.leaves)


@every_head
@every_chunking
def test_mean_token_is_mean_distribution(
    kind: str, tokens_at_once: int, make_pairs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk(monkeypatch, tokens_at_once)
    case = Case(kind, tokens=42)
    log_p = forward_of(case, make_pairs).mean_token()
    pairs = make_pairs([(3, 4, 2), (1, 1, 5), (2, 3, 1)], vocabulary=11)
    width, places = case.hidden.shape[0] // 6, []
    for row in range(6):
        pair = pairs[row % 3]
        answer = pair.chosen_ids if row < 3 else pair.rejected_ids
        places += [row * width + len(pair.prompt_ids) - 1 + place for place in range(len(answer))]
    naive = torch.stack([logits_of(case.hidden[place : place + 1], case.head)[0].softmax(-1) for place in places])
    assert not log_p.requires_grad
    torch.testing.assert_close(log_p.exp(), naive.mean(0).detach(), rtol=1e-12, atol=1e-12)
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_mean_token_holds_one_chunk(make_pairs: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    chunk(monkeypatch, 2)
    case, alive, most = Case(tokens=42), weakref.WeakSet(), 0  # type: ignore[var-annotated]

    def watched(*values: Any) -> Tensor:
        nonlocal most
        alive.add(found := logits_of(*values))
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(causal, "logits_of", watched)
    forward_of(case, make_pairs).mean_token()
    assert most == 1


@pytest.mark.parametrize(("mixed", "nats"), [(False, 1e-4), (True, 0.02)], ids=["float32", "bf16-mixed"])
def test_z_agrees_with_all_codes(mixed: bool, nats: float, make_pairs: Callable[..., Any], tiny: Any) -> None:
    """Compare a code as z with its column of all codes. A sum with the states would lose it to rounding."""
    policy = tiny("llama", dtype="float32", attention="sdpa", width=64, context=256)
    batch = PaddedLayout(0)(make_pairs([(5, 60, 70), (11, 90, 40)]))
    codes = torch.randn(4, policy.width, generator=torch.Generator().manual_seed(0)) * 0.05
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        forward = policy(batch)
        at_once = forward.logps_per_code(codes)
        one_by_one = torch.stack([forward.logps(code.expand(2, -1)) for code in codes], dim=1)
        plain = forward.logps()
    assert (at_once - one_by_one).abs().max() <= nats
    assert (at_once - plain[:, None]).abs().max() > 20 * nats, "the codes matter"


@pytest.mark.parametrize("shape", [(), (3,)])
def test_sum_by_answer_of_padded_tokens(shape: tuple[int, ...]) -> None:
    owner = torch.tensor([0, 0, 1, 3, 3, 4, 4])  # answer 2 is empty; 4 is padding
    values = torch.randn(7, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([sum((values[i] for i in range(7) if owner[i] == a), torch.zeros(shape)) for a in range(4)])
    torch.testing.assert_close(causal.sum_by_answer(values, owner, 4), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(causal.sum_by_product(values, owner, 4), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [causal.sum_by_answer, causal.sum_by_product])
def test_sum_by_answer_rounds_once(function: Callable[..., torch.Tensor]) -> None:
    """Two answers of 500 tokens, in three columns. `math.fsum` does not round between its terms."""
    values = -12 * torch.rand(1000, 3, generator=torch.Generator().manual_seed(0))
    owner = torch.arange(1000) % 2
    exact = [[math.fsum(column) for column in values[answer::2].T.tolist()] for answer in range(2)]
    assert torch.equal(function(values, owner, 2), torch.tensor(exact))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("function", [causal.sum_by_answer, causal.sum_by_product])
def test_sum_by_answer_keeps_bad_values_apart(function: Callable[..., torch.Tensor], value: float) -> None:
    """Put one bad value into answer 1 of one column, and one into the padding."""
    owner = torch.tensor([0, 0, 1, 1, 3, 4])  # 4 is padding
    values = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    values[2, 1] = values[5, 0] = value
    sums = function(values, owner, 4)
    expected = torch.stack([sum((values[i] for i in range(6) if owner[i] == a), torch.zeros(2)) for a in range(4)])
    assert sums.isfinite().tolist() == [[True, True], [True, False], [True, True], [True, True]]
    torch.testing.assert_close(sums[sums.isfinite()], expected[sums.isfinite()])
