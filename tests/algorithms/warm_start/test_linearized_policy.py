"""Pairs in the sketch against real readings, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from lpc_lightning.algorithms.scoring import BatchScorer
from lpc_lightning.algorithms.warm_start.linearized_policy import (
    LinearizedForward,
    LinearizedPairs,
    MeanToken,
    relabelled,
    row_of,
)
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.losses import dpo_loss, ipo_loss, simpo_loss
from lpc_lightning.policy.logprobs import BatchForward
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PreferenceBatch

WIDTH, VOCABULARY = 5, 11
LOSSES: dict[str, Any] = {
    "dpo": partial(dpo_loss, beta=0.5),
    "rdpo": partial(dpo_loss, beta=0.5, label_smoothing=0.2, robust=True),
    "ipo": partial(ipo_loss, beta=0.3),
    "ipo, averaged": partial(ipo_loss, beta=0.3, length_average=True),
    "simpo": partial(simpo_loss, beta=2.0, gamma_beta_ratio=0.5),
}
every_loss = pytest.mark.parametrize("algorithm", list(LOSSES))


class Real:
    """A reading of three pairs, whose hidden states differ or (`alike`) are the same at every token."""

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
        self.reading = BatchForward(hidden, self.batch, self.head)
        self.token = MeanToken(self.head, self.reading.mean_token())
        self.sketch = LinearizedForward(*self.reading.first_order(), self.batch.lengths, self.token)


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"bias": True, "scale": 0.3}])
@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_it_is_exact_for_any_z_where_all_tokens_have_one_distribution(
    size: float, settings: dict[str, Any], make_pairs: Callable[..., Any]
) -> None:
    real = Real(make_pairs, alike=True, settings=settings)
    z, codes = size * real.draw(3, WIDTH), size * real.draw(4, WIDTH)
    torch.testing.assert_close(real.sketch.logps(), real.reading.logps(), rtol=1e-12, atol=0)
    torch.testing.assert_close(real.sketch.logps(z), real.reading.logps(z), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        real.sketch.logps_per_code(codes), real.reading.logps_per_code(codes), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("settings", [{}, {"bias": True, "scale": 0.3}, {"softcap": 2.0}])
def test_elsewhere_what_is_missing_shrinks_with_the_square_of_z(
    settings: dict[str, Any], make_pairs: Callable[..., Any]
) -> None:
    real = Real(make_pairs, alike=False, settings=settings)
    z = real.draw(3, WIDTH)

    def apart(size: float) -> Tensor:
        return real.sketch.logps(size * z) - real.reading.logps(size * z)

    assert apart(0.1).abs().max() > 1e-3, "the sketch is one"
    assert float(apart(1e-2).norm() / apart(1e-3).norm()) == pytest.approx(100, rel=0.1)


def test_a_code_is_the_z_of_all_pairs(make_pairs: Callable[..., Any]) -> None:
    real = Real(make_pairs, alike=False)
    codes = real.draw(4, WIDTH)
    by_hand = torch.stack([real.sketch.logps(code.expand(3, -1)) for code in codes], dim=1)
    torch.testing.assert_close(real.sketch.logps_per_code(codes), by_hand, rtol=1e-12, atol=1e-12)


def test_the_divergence_is_torchs(make_pairs: Callable[..., Any]) -> None:
    real = Real(make_pairs, alike=False, settings={"bias": True, "scale": 0.3})
    codes = torch.cat([real.draw(4, WIDTH), torch.zeros(1, WIDTH)])
    plain = Categorical(logits=real.token.log_p)
    expected = [
        kl_divergence(plain, Categorical(logits=real.token.log_p + 0.3 * real.head.weight @ code)) for code in codes
    ]
    found = real.token.divergence(codes)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert found[:4].min() > 0
    assert found[4].item() == pytest.approx(0.0, abs=1e-12)


@every_loss
def test_a_pairs_row_says_what_its_reading_says(algorithm: str, make_pairs: Callable[..., Any]) -> None:
    real, loss = Real(make_pairs, alike=False), LOSSES[algorithm]
    reference = None if algorithm == "simpo" else real.reading.logps() + real.draw(6)
    plain, z_gradients = real.reading.first_order()
    rows = row_of(real.reading.states, plain, z_gradients, real.batch)
    assert rows.shape == (3, 5 * WIDTH + 4)
    assert rows.dtype == torch.float32
    # Of a longer table, in another order.
    filler = torch.full((2, rows.shape[1]), torch.nan)
    table = torch.cat([filler[:1], rows[[2, 0]], filler[1:], rows[[1]]]).double()
    of_pairs = None if reference is None else reference.view(2, 3).T[[0, 2, 0, 0, 1]]
    pairs = LinearizedPairs(table, of_pairs, real.token, ["", "ann", "bob", "", "cem"], loss)
    assert len(pairs) == 5
    indices = torch.tensor([2, 4, 1])
    states, score = pairs.take(indices)
    assert states.annotators == ("bob", "cem", "ann")
    for found, expected in zip(
        (states.prompt, states.chosen, states.rejected),
        (real.reading.states.prompt, real.reading.states.chosen, real.reading.states.rejected),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        pairs.z_gradient_difference[indices], z_gradients[:3] - z_gradients[3:], rtol=1e-6, atol=1e-6
    )

    truth = BatchScorer(real.reading, real.batch.lengths, reference, loss)
    assert_same(score.under(None), truth.under(None))
    linearized = BatchScorer(real.sketch, real.batch.lengths, reference, loss)
    z, codes = real.draw(3, WIDTH), real.draw(4, WIDTH)
    assert_same(score.under(z), linearized.under(z))
    assert_same(score.under_codes(codes), linearized.under_codes(codes))


def test_other_labels_change_the_two_answers_about(make_pairs: Callable[..., Any]) -> None:
    real = Real(make_pairs, alike=False)
    rows = row_of(real.reading.states, *real.reading.first_order(), real.batch).double()
    swaps = torch.tensor([True, False, True])
    both = [
        LinearizedPairs(each, None, real.token, [""] * 3, LOSSES["simpo"]) for each in (rows, relabelled(rows, swaps))
    ]
    every, z = torch.arange(3), real.draw(3, WIDTH)
    (states, score), (others, other) = (pairs.take(every) for pairs in both)
    assert torch.equal(states.prompt, others.prompt)
    for place, swap in enumerate(swaps.tolist()):
        scorer = score.swapped() if swap else score
        torch.testing.assert_close(other.under(z)[0].losses[place], scorer.under(z)[0].losses[place])
        assert torch.equal(others.chosen[place], (states.rejected if swap else states.chosen)[place])
        assert torch.equal(others.rejected[place], (states.chosen if swap else states.rejected)[place])


def assert_same(found: tuple[PairLosses, PairLogps], expected: tuple[PairLosses, PairLogps]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        mine, other = (dataclasses.asdict(each) for each in (ours, theirs))
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, check_dtype=False)
