"""Tests of whole steps without a latent against loops over pairs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import Layout
from lpc_lightning.policy import LoRA
from lpc_lightning.reference.live import SharedModel
from lpc_lightning.types import PairLogps, TokenizedPair
from tests.algorithms.conftest import Make, every_layout
from tests.algorithms.naive_losses import ALGORITHMS, every_algorithm, log_sigmoid


@pytest.mark.slow
@every_algorithm
@every_layout
def test_step_equals_loop_over_pairs(
    algorithm: str,
    layout: Layout,
    pairs: list[TokenizedPair],
    make: Make,
    exact: Callable[..., Any],
    naive_logps: Callable[..., Tensor],
    train_step: Callable[..., Any],
) -> None:
    module = make(algorithm)
    policy = exact(module.policy)
    reference = None if module.reference is None else exact(module.reference.policy)
    assert (reference is None) == (algorithm in ("simpo", "orpo"))
    policy_of = naive_logps(policy.model, pairs)
    reference_of = torch.full_like(policy_of, torch.nan)
    if reference is not None:
        reference_of = naive_logps(reference.model, pairs).detach()
        assert (policy_of - reference_of).abs().min() > 1e-3
    naive = ALGORITHMS[algorithm][3]
    losses = [
        naive(
            *(policy_of[number], policy_of[number + 4], reference_of[number], reference_of[number + 4]),
            *(len(pair.chosen_ids), len(pair.rejected_ids)),
        )
        for number, pair in enumerate(pairs)
    ]
    expected = torch.stack(losses).mean()
    named = dict(policy.named_parameters())
    gradients = dict(zip(named, torch.autograd.grad(expected, list(named.values())), strict=True))

    ours = train_step(module, pairs, layout)
    torch.testing.assert_close(ours.loss, expected.detach(), rtol=1e-9, atol=1e-9)
    assert set(ours.gradients) == {f"policy.{name}" for name in named}, "the reference does not train"
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours.gradients[f"policy.{name}"], gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.slow
@every_algorithm
@every_layout
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_step_without_latent_is_bitwise_plain(
    algorithm: str,
    layout: Layout,
    dtype: str,
    pairs: list[TokenizedPair],
    make: Make,
    train_step: Callable[..., Any],
) -> None:
    module = make(algorithm, dtype=dtype)
    policy, reference = copy.deepcopy(module.policy), copy.deepcopy(module.reference)
    batch = layout(pairs)
    logps = policy(batch).logps()
    of_reference = (None, None)
    if reference is not None:
        of_reference = reference.policy(batch).logps().detach().chunk(2)
    lengths = batch.lengths.to(logps.dtype).chunk(2)
    loss = ALGORITHMS[algorithm][2](PairLogps(*logps.chunk(2), *of_reference, *lengths)).losses.mean()
    loss.backward()

    ours = train_step(module, pairs, layout)
    assert torch.equal(ours.loss, loss.detach())
    assert {f"policy.{name}" for name, _ in policy.named_parameters()} == set(ours.gradients)
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(ours.gradients[f"policy.{name}"], parameter.grad), name


@every_layout
def test_adapter_reference_is_policy_without_it(
    layout: Layout,
    pairs: list[TokenizedPair],
    make: Make,
    tiny_spec: Callable[..., Any],
    naive_logps: Callable[..., Tensor],
    train_step: Callable[..., Any],
) -> None:
    module = make("dpo", lora=LoRA(rank=3))
    assert isinstance(module.reference, SharedModel)
    with torch.no_grad():
        policy, reference = (
            naive_logps(module.policy.model, pairs),
            naive_logps(tiny_spec("llama").build().model, pairs),
        )
    ratios = policy - reference
    assert ratios.abs().min() > 1e-4
    expected = -log_sigmoid(0.3 * (ratios[:4] - ratios[4:])).mean()
    ours = train_step(module, pairs, layout)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-9, atol=1e-9)
    assert all("lora_" in name for name in ours.gradients)


def test_untrained_policy_has_zero_margins(
    pairs: list[TokenizedPair], tiny_spec: Callable[..., Any], train_step: Callable[..., Any]
) -> None:
    metrics = train_step(DPO(policy=tiny_spec("llama"), reference="live"), pairs).metrics
    assert float(metrics["train/loss"]) == pytest.approx(math.log(2), abs=1e-15)
    assert float(metrics["train/rewards/margins"]) == 0
    assert float(metrics["train/rewards/accuracies"]) == 0.5
