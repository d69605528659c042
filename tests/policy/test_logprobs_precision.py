"""Tests of rounding errors of log-probabilities under codes, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lpc_lightning.policy import logprobs
from lpc_lightning.policy.logprobs import (
    code_logits,
    code_range,
    token_logps,
    token_logps_and_greedy,
    token_logps_per_code,
)
from lpc_lightning.types import LogitHead
from tests.policy.logit_cases import Case, assert_all_close, linear_head


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


@linear_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_codes_are_widened_on_all_paths(kind: str, dtype: torch.dtype) -> None:
    """Under FSDP2, the codebook has the type of `trainer.precision: bf16-true`. Logit biases are in float32."""
    case = Case(kind, tokens=64, vocabulary=256, width=64, codes=6, dtype=torch.float32, code_scale=0.5)
    case.hidden, case.codes = (x.detach().to(dtype).requires_grad_() for x in (case.hidden, case.codes))
    head = {name: value.detach().to(dtype).requires_grad_() for name, value in case._head_tensors().items()}
    case.head = replace(case.head, **head)
    group = torch.zeros_like(case.targets)
    ours = token_logps_per_code(case.hidden, case.targets, case.head, case.codes)
    under_z = [token_logps(case.hidden, case.targets, case.head, code[None], group) for code in case.codes]
    torch.testing.assert_close(ours, torch.stack(under_z, dim=-1), rtol=0, atol=1e-3)
    exact = case.in_float64()
    biases = code_logits(exact.head, exact.codes).detach()
    assert code_range(case.head, case.codes).item() == pytest.approx((biases.amax(-1) - biases.amin(-1)).max().item())
    for found, expected in zip(case.gradients(ours), case.gradients(torch.stack(under_z, dim=-1)), strict=True):
        assert found.dtype == expected.dtype == dtype
        assert (found.float() - expected.float()).norm() < 2**-6 * expected.float().norm()


def test_autocast_rounds_the_product_only() -> None:
    case = Case(tokens=16, vocabulary=64, width=32, codes=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logps(case.hidden, case.targets, case.head)
        logits = case.hidden.bfloat16() @ case.head.weight.bfloat16().T
        greedy_logps, _ = token_logps_and_greedy(case.hidden, case.targets, case.head)
    expected = logits.double().log_softmax(-1).gather(1, case.targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(greedy_logps, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_under_z_adds_z_in_float32(dtype: torch.dtype) -> None:
    case = Case("scale", tokens=64, vocabulary=256, width=32, codes=3, dtype=torch.float32)
    hidden, head = case.hidden.detach().to(dtype), replace(case.head, weight=case.head.weight.detach().to(dtype))
    group, codes = torch.arange(64) % 3, case.codes.detach()
    bias = torch.zeros(()) if head.bias is None else head.bias.detach()
    product = (hidden @ head.weight.T).double() + bias.double()
    logits = head.scale * (product + (codes.double() @ head.weight.double().T)[group])
    targets = torch.where(torch.arange(64) % 2 == 0, logits.argmax(-1), case.targets)
    logps, greedy = token_logps_and_greedy(hidden, targets, head, codes, group)
    assert torch.equal(greedy, targets == logits.argmax(-1))
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)


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
