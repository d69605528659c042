"""Tests of pairs under the linearized policy against real forward passes, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.algorithms.warm_start.linearized_policy import (
    LinearizedForward,
    LinearizedPairs,
    MeanToken,
    make_rows,
    swap_labels,
)
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.losses import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from lpc_lightning.policy.causal import BatchForward
from lpc_lightning.robust import UnbiasedLoss
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PreferenceBatch

WIDTH, VOCABULARY = 5, 11
LOSSES: dict[str, Any] = {
    "dpo": partial(dpo_loss, beta=0.5),
    "rdpo": partial(UnbiasedLoss(0.2).pair_losses, partial(dpo_loss, beta=0.5)),
    "ipo": partial(ipo_loss, beta=0.3),
    "ipo, averaged": partial(ipo_loss, beta=0.3, length_average=True),
    "simpo": partial(simpo_loss, beta=2.0, gamma_beta_ratio=0.5),
    "kto": partial(kto_loss, beta=0.5, reference_point=0.3),
    "orpo": partial(orpo_loss, beta=0.5),
}


class ForwardCase:
    """Forward pass of three pairs. Their hidden states differ, or (`alike`) are equal at every token."""

    def __init__(self, make_pairs: Callable[..., Any], alike: bool, settings: dict[str, Any] | None = None) -> None:
        generator = torch.Generator().manual_seed(2)
        self.draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        pairs = make_pairs([(3, 4, 2), (1, 1, 5), (2, 3, 1)], vocabulary=VOCABULARY)
        self.batch: PreferenceBatch = PaddedLayout(pad_id=0)(pairs)
        hidden = self.draw(self.batch.input_ids.numel(), WIDTH)
        if alike:
            hidden = hidden[:1].expand_as(hidden)
        settings = dict(settings or {})
        if settings.pop("bias", False):
            settings["bias"] = self.draw(VOCABULARY)
        self.head = LogitHead(self.draw(VOCABULARY, WIDTH), **settings)
        self.forward = BatchForward(hidden, self.batch, self.head)
        self.token = MeanToken(self.head, self.forward.mean_token())
        self.linearized = LinearizedForward(*self.forward.first_order(), self.batch.lengths, self.token)


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"bias": True, "scale": 0.3}])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_logps_exact_for_equal_token_distributions(
    size: float, settings: dict[str, Any], make_pairs: Callable[..., Any]
) -> None:
    case = ForwardCase(make_pairs, alike=True, settings=settings)
    z, codes = size * case.draw(3, WIDTH), size * case.draw(4, WIDTH)
    torch.testing.assert_close(case.linearized.logps(), case.forward.logps(), rtol=1e-12, atol=0)
    torch.testing.assert_close(case.linearized.logps(z), case.forward.logps(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        case.linearized.logps_per_code(codes), case.forward.logps_per_code(codes), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("settings", [{}, {"bias": True, "scale": 0.3}, {"softcap": 2.0}])
def test_logps_error_is_quadratic_in_z(settings: dict[str, Any], make_pairs: Callable[..., Any]) -> None:
    case = ForwardCase(make_pairs, alike=False, settings=settings)
    z = case.draw(3, WIDTH)

    def error(size: float) -> Tensor:
        return case.linearized.logps(size * z) - case.forward.logps(size * z)

    assert error(0.1).abs().max() > 1e-3, "the linearized policy is an approximation"
    assert float(error(1e-2).norm() / error(1e-3).norm()) == pytest.approx(100, rel=0.1)


def test_logps_per_code_equal_logps_under_z(make_pairs: Callable[..., Any]) -> None:
    case = ForwardCase(make_pairs, alike=False)
    codes = case.draw(4, WIDTH)
    by_hand = torch.stack([case.linearized.logps(code.expand(3, -1)) for code in codes], dim=1)
    torch.testing.assert_close(case.linearized.logps_per_code(codes), by_hand, rtol=1e-12, atol=1e-12)


def test_divergence_equals_torch_distributions(make_pairs: Callable[..., Any]) -> None:
    case = ForwardCase(make_pairs, alike=False, settings={"bias": True, "scale": 0.3})
    codes = torch.cat([case.draw(4, WIDTH), torch.zeros(1, WIDTH)])
    plain = Categorical(logits=case.token.log_p)
    expected = [
        kl_divergence(plain, Categorical(logits=case.token.log_p + 0.3 * case.head.weight @ code)) for code in codes
    ]
    actual = case.token.divergence(codes)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert actual[:4].min() > 0
    assert actual[4].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("margins", [None, torch.tensor([0.5, 1.5, 0.25])], ids=["plain", "margins"])
@pytest.mark.parametrize("algorithm", [name for name in LOSSES if name != "kto"])
def test_rows_reproduce_pairs_with_margins(
    algorithm: str, margins: Tensor | None, make_pairs: Callable[..., Any]
) -> None:
    check_rows(algorithm, margins, make_pairs)


def test_rows_reproduce_pairs_of_kto(make_pairs: Callable[..., Any]) -> None:
    check_rows("kto", None, make_pairs)  # it refuses margins


def check_rows(algorithm: str, margins: Tensor | None, make_pairs: Callable[..., Any]) -> None:
    case, loss = ForwardCase(make_pairs, alike=False), LOSSES[algorithm]
    reference = None if algorithm in ("simpo", "orpo") else case.forward.logps() + case.draw(6)
    plain, z_gradients = case.forward.first_order()
    rows = make_rows(case.forward.states, plain, z_gradients, case.batch)
    assert rows.shape == (3, 5 * WIDTH + 4)
    assert rows.dtype == torch.float32
    # The rows are part of a longer table, in another order.
    filler = torch.full((2, rows.shape[1]), torch.nan)
    table = torch.cat([filler[:1], rows[[2, 0]], filler[1:], rows[[1]]]).double()
    of_pairs = None if reference is None else reference.view(2, 3).T[[0, 2, 0, 0, 1]]
    of_table = None if margins is None else margins[[0, 2, 0, 0, 1]]
    pairs = LinearizedPairs(table, of_pairs, case.token, ["", "ann", "bob", "", "cem"], loss, of_table)
    assert len(pairs) == 5
    indices = torch.tensor([2, 4, 1])
    states, score = pairs.select(indices)
    assert states.annotators == ("bob", "cem", "ann")
    for actual, expected in zip(
        (states.prompt, states.chosen, states.rejected),
        (case.forward.states.prompt, case.forward.states.chosen, case.forward.states.rejected),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        pairs.z_gradient_difference[indices], z_gradients[:3] - z_gradients[3:], rtol=1e-6, atol=1e-6
    )

    truth = BatchScorer(case.forward, case.batch.lengths, reference, loss, target_margins=margins)
    assert_same(score.under(None), truth.under(None))
    linearized = BatchScorer(case.linearized, case.batch.lengths, reference, loss, target_margins=margins)
    z, codes = case.draw(3, WIDTH), case.draw(4, WIDTH)
    assert_same(score.under(z), linearized.under(z))
    assert_same(score.under_codes(codes), linearized.under_codes(codes))


def test_swap_labels_swaps_answers(make_pairs: Callable[..., Any]) -> None:
    case = ForwardCase(make_pairs, alike=False)
    rows = make_rows(case.forward.states, *case.forward.first_order(), case.batch).double()
    swaps = torch.tensor([True, False, True])
    labellings = [
        LinearizedPairs(table, None, case.token, [""] * 3, LOSSES["simpo"])
        for table in (rows, swap_labels(rows, swaps))
    ]
    every, z = torch.arange(3), case.draw(3, WIDTH)
    (states, score), (others, other) = (pairs.select(every) for pairs in labellings)
    assert torch.equal(states.prompt, others.prompt)
    for index, swap in enumerate(swaps.tolist()):
        scorer = score.swapped() if swap else score
        torch.testing.assert_close(other.under(z)[0].losses[index], scorer.under(z)[0].losses[index])
        assert torch.equal(others.chosen[index], (states.rejected if swap else states.chosen)[index])
        assert torch.equal(others.rejected[index], (states.chosen if swap else states.rejected)[index])


def assert_same(actual: tuple[PairLosses, PairLogps], expected: tuple[PairLosses, PairLogps]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        first, second = map(tensors_of, (ours, theirs))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5, check_dtype=False)


def tensors_of(terms: PairLosses | PairLogps) -> dict[str, Any]:
    """Fields by name, with the value of each term of the loss."""
    fields = {field.name: getattr(terms, field.name) for field in dataclasses.fields(terms)}
    return fields | {"parts": [term.of(term.log_likelihood) for term in fields.pop("parts", ())]}
