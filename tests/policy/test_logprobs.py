"""Tests of chunked log-probabilities and their gradients against a plain float64 log-softmax."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.policy import causal, logprobs
from lpc_lightning.policy.causal import BatchForward
from lpc_lightning.policy.logprobs import (
    code_logits,
    logits_of,
    token_logps,
    token_logps_and_greedy,
    token_logps_per_code,
)
from lpc_lightning.types import LogitHead

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "all": {"bias": True, "scale": 3.0, "softcap": 2.0},
}
every_head = pytest.mark.parametrize("kind", list(HEADS))
linear_head = pytest.mark.parametrize("kind", [kind for kind, settings in HEADS.items() if "softcap" not in settings])
every_chunking = pytest.mark.parametrize("tokens_at_once", [1, 3, 100])


class Case:
    """Random states, targets, head and codes. `leaves` are the tensors with a gradient."""

    def __init__(
        self,
        kind: str = "plain",
        tokens: int = 7,
        vocabulary: int = 11,
        width: int = 5,
        codes: int = 4,
        dtype: torch.dtype = torch.float64,
        code_scale: float = 0.7,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

        settings = dict(HEADS[kind])
        bias = draw(vocabulary) if settings.pop("bias", False) else None
        self.hidden, self.codes = draw(tokens, width), draw(codes, width, scale=code_scale)
        self.head = LogitHead(draw(vocabulary, width), bias, **settings)
        self.targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
        self.weights = torch.randn(tokens, codes, generator=generator, dtype=torch.float64)

    @property
    def leaves(self) -> list[Tensor]:
        bias = [] if self.head.bias is None else [self.head.bias]
        return [self.hidden, self.codes, self.head.weight, *bias]

    def in_float64(self) -> Case:
        exact = Case.__new__(Case)
        exact.targets, exact.weights = self.targets, self.weights
        exact.hidden, exact.codes = (x.detach().double().requires_grad_() for x in (self.hidden, self.codes))
        head = {name: value.detach().double().requires_grad_() for name, value in self._head_tensors().items()}
        exact.head = replace(self.head, **head)
        return exact

    def _head_tensors(self) -> dict[str, Tensor]:
        found = {"weight": self.head.weight, "bias": self.head.bias}
        return {name: value for name, value in found.items() if value is not None}

    def naive(self) -> Tensor:
        """Compute (N, K) one token and one code at a time."""
        rows = []
        for state, target in zip(self.hidden, self.targets.tolist(), strict=True):
            row = []
            for code in self.codes:
                logits = self.head.weight @ (state + code)
                if self.head.bias is not None:
                    logits = logits + self.head.bias
                logits = self.head.scale * logits
                if self.head.softcap is not None:
                    logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
                row.append(torch.log_softmax(logits, dim=-1)[target])
            rows.append(torch.stack(row))
        return torch.stack(rows)

    def gradients(self, logps: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((self.weights.to(logps.dtype) * logps).sum(), self.leaves)


def chunk(monkeypatch: pytest.MonkeyPatch, tokens: int, vocabulary: int = 11) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", tokens * vocabulary + vocabulary - 1)


def assert_all_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


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


@linear_head
def test_thin_product_equals_separate_heads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 10 * 512)
    case = Case(kind, tokens=64, vocabulary=512, width=32, codes=6, dtype=torch.float32, code_scale=0.2)
    thin = token_logps_per_code(case.hidden, case.targets, case.head, case.codes)
    separate = [token_logps(case.hidden + code, case.targets, case.head) for code in case.codes]
    assert thin.dtype == torch.float32
    torch.testing.assert_close(thin, torch.stack(separate, dim=-1), rtol=0, atol=1e-4)


@linear_head
@pytest.mark.parametrize("code_scale", [20.0, 200.0], ids=["float64", "separate heads"])
def test_wide_codes_as_exact_as_separate_heads(kind: str, code_scale: float) -> None:
    case = Case(kind, tokens=16, vocabulary=64, width=8, codes=4, dtype=torch.float32, code_scale=code_scale)
    exact = case.in_float64()
    table = logprobs.code_logits(exact.head, exact.codes)
    across = (table.amax(-1) - table.amin(-1)).max().item()
    assert (logprobs.THIN_RANGE < across < logprobs.WIDE_RANGE) == (code_scale == 20.0), across
    found, expected_values = token_logps_per_code(case.hidden, case.targets, case.head, case.codes), exact.naive()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected_values, rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(case.gradients(found), exact.gradients(expected_values), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def errors(case: Case, logps: Tensor, exact: Case) -> dict[str, float]:
    """Return errors against float64 of values, of differences between codes, and (relative) of gradients."""
    expected_values = exact.naive()
    apart = logps.double() - expected_values
    found = {"values": apart, "between codes": apart - apart.mean(-1, keepdim=True)}
    result = {name: error.square().mean().sqrt().item() for name, error in found.items()}
    for name, ours, theirs in zip(
        ("hidden", "codes", "weight"), case.gradients(logps), exact.gradients(expected_values), strict=True
    ):
        result[name] = ((ours.double() - theirs).norm() / theirs.norm()).item()
    return result


def test_thin_product_under_autocast() -> None:
    case = Case(tokens=128, vocabulary=256, width=64, codes=6, dtype=torch.float32, code_scale=1.0)
    case.head = replace(case.head, weight=(0.1 * case.head.weight.detach()).requires_grad_())
    exact = case.in_float64()
    with torch.autocast("cpu", torch.bfloat16):
        thin = token_logps_per_code(case.hidden, case.targets, case.head, case.codes)
        heads = [torch.nn.functional.linear(case.hidden + code, case.head.weight) for code in case.codes]
    assert heads[0].dtype == torch.bfloat16
    at_targets = [logits.float().log_softmax(-1).gather(1, case.targets[:, None]) for logits in heads]
    ours, direct = errors(case, thin, exact), errors(case, torch.cat(at_targets, dim=1), exact)
    assert thin.dtype == torch.float32
    assert direct["values"] > 1e-3, "bfloat16 was not used"
    assert ours["values"] < direct["values"]
    assert ours["between codes"] < direct["between codes"] / 5
    assert ours["weight"] < direct["weight"]
    assert ours["codes"] < direct["codes"] / 3
    assert ours["hidden"] < 2**-8


def test_autocast_rounds_the_product_only() -> None:
    case = Case(tokens=16, vocabulary=64, width=32, codes=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logps(case.hidden, case.targets, case.head)
        logits = case.hidden.bfloat16() @ case.head.weight.bfloat16().T
        greedy_logps, _ = token_logps_and_greedy(case.hidden, case.targets, case.head)
    expected = logits.double().log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy_logps, found)


@pytest.mark.parametrize("nats", [30.0, 59.0, 61.0, 400.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_of_any_range_are_exact(nats: float, dtype: torch.dtype) -> None:
    """Test the worst case for exp(b_k - max b_k): the policy's likeliest token has the code's lowest bias."""
    case = Case(tokens=6, vocabulary=8, width=4, codes=2, dtype=torch.float64)
    weight = case.head.weight.detach()
    direction = torch.linalg.lstsq(weight, torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]).solution[:, 0]
    span = (weight @ direction).max() - (weight @ direction).min()
    code = direction * nats / span
    hidden = case.hidden.detach() - code
    case.hidden, case.codes = (x.to(dtype).requires_grad_() for x in (hidden, torch.stack([code, -0.5 * code])))
    case.head = LogitHead(weight.to(dtype).requires_grad_())
    bias = code_logits(case.head, case.codes[:1])
    assert (bias.max() - bias.min()).item() == pytest.approx(nats, rel=1e-5)

    exact = case.in_float64()
    ours, expected_values = token_logps_per_code(case.hidden, case.targets, case.head, case.codes), exact.naive()
    # The rounding error of a logit of size `nats` is `nats` times the type's precision.
    resolution = 4 * nats * torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), expected_values, rtol=0, atol=resolution)
    for found, expected in zip(case.gradients(ours), exact.gradients(expected_values), strict=True):
        assert (found.double() - expected).norm() <= resolution * expected.norm()


def test_one_wide_code_leaves_others_exact() -> None:
    case = Case(codes=3)
    far = case.codes.detach().clone()
    far[1] *= 200
    case.codes = far.requires_grad_()
    ours, theirs = token_logps_per_code(case.hidden, case.targets, case.head, case.codes), case.naive()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-11)
    assert_all_close(case.gradients(ours), case.gradients(theirs), 1e-10)


@linear_head
def test_code_logits_equal_logit_difference(kind: str) -> None:
    case = Case(kind)
    with_code = torch.stack([logits_of(case.hidden + code, case.head) for code in case.codes], dim=1)
    without = logits_of(case.hidden, case.head)[:, None]
    torch.testing.assert_close(with_code - without, code_logits(case.head, case.codes).expand(7, -1, -1))


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
