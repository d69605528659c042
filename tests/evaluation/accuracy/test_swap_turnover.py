"""Tests of the swap turnover of posteriors that are made by hand, with and without a leak of the label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.evaluation.accuracy.mode_margins import turnover
from lpc_lightning.latent import GumbelSpace
from tests.evaluation.accuracy.conftest import Build, report_of

A, B = 7, 11
"""Tokens of the two answers."""


def leak_module(build: Build, make_pairs: Callable[..., Any], leaking: bool) -> tuple[PreferenceModule, Any]:
    """Make a module whose posterior depends on the order of the answers, or not.

    The answers are A or B. Code 0 makes A likelier, and code 1 makes B likelier. Let s be the projection that separates
    the two tokens. The hidden layer of the leaking posterior has u = s(first) - s(second) and -u. Since
    gelu(u) - gelu(-u) = u, its logits are u and -u. The other posterior has u = s(first) + s(second).
    """
    pairs = make_pairs([(3 + number, 1, 1) for number in range(8)])
    pairs = [replace(pair, chosen_ids=[A], rejected_ids=[B]) for pair in pairs]
    pairs[::3] = [replace(pair, chosen_ids=[B], rejected_ids=[A]) for pair in pairs[::3]]
    module = build("dpo", GumbelSpace(num_codes=2, hidden=2, init_logit_std=1.0))
    space: Any = module.latent
    forward = module.policy(PaddedLayout(0)(pairs))
    first_is_a = torch.tensor([pair.chosen_ids == [A] for pair in pairs])
    states = torch.nn.functional.rms_norm(forward.states.chosen, (16,))
    others = torch.nn.functional.rms_norm(forward.states.rejected, (16,))
    a, b = (torch.where(first_is_a[:, None], *choices) for choices in ((states, others), (others, states)))
    direction = (a - b).mean(0)
    assert ((a - b) @ direction > 0).all(), "the projection must separate the tokens"
    sign = -1.0 if leaking else 1.0
    row = torch.cat([direction, sign * direction])
    space.posterior.first.weight.copy_(20 * torch.stack([row, -row]))
    space.posterior.first.bias.zero_()
    space.posterior.second.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    space.posterior.second.bias.zero_()
    head = module.policy.head.weight
    lift = 30 * (head[A] - head[B]) / (head[A] - head[B]).norm() ** 2
    space.codebook.weight.copy_(torch.stack([lift, -lift]))
    return module, pairs


def test_swap_turnover_of_leaking_posterior(build: Build, make_pairs: Callable[..., Any]) -> None:
    module, pairs = leak_module(build, make_pairs, leaking=True)
    actual = report_of(module, [PaddedLayout(0)(pairs)]).metrics
    assert actual["swap_turnover"] == 1.0
    assert actual["accuracy/posterior"] == 1.0, "it only repeats the label"


def test_swap_turnover_of_symmetric_posterior(build: Build, make_pairs: Callable[..., Any]) -> None:
    module, pairs = leak_module(build, make_pairs, leaking=False)
    actual = report_of(module, [PaddedLayout(0)(pairs)])
    assert actual.metrics["swap_turnover"] == 0.0
    margins = [item["margins"] for item in actual.items]
    assert max(abs(margin["posterior"]) for margin in margins) > 1, "the posterior must have an effect"
    assert 0 < actual.metrics["accuracy/posterior"] < 1


def test_turnover_with_ties() -> None:
    one, other = torch.tensor([[2.0, 3.0, 1.0, 0.0, 0.0, -1.0], [-0.5, 4.0, 0.0, -2.0, 0.0, -9.0]])
    assert turnover(one, other).tolist() == [1, 0, 0.5, 0.5, 0, 0]
    assert torch.equal(turnover(one, other), turnover(other, one))
