"""Tests of the decision: formulas, random labels, and planted factors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lpc_lightning import latent
from lpc_lightning.algorithms.warm_start.decision import Decision, decide, likelihood_gains
from lpc_lightning.algorithms.warm_start.fit import fit
from lpc_lightning.algorithms.warm_start.linearized_policy import LinearizedPairs
from lpc_lightning.losses import dpo_loss


def fitted(data: Any, pairs: int, **settings: Any) -> Any:
    """Return a space fitted to the first pairs, a tenth of which is the selection."""
    torch.manual_seed(0)
    space = latent.MarginalSpace(**({"hidden": 16, "num_codes": 4} | settings))
    space.build(data.head.weight.shape[1], data.head)
    fit(space, data.part(0, pairs), pairs // 10, 1e-2)
    return space


def test_decision_keeps_nothing_on_random_labels(planted: Callable[..., Any]) -> None:
    """Twenty seeds of labels that nothing decides. Scales and epochs were selected on other noise."""
    kept = 0
    for seed in range(20):
        data = planted(pairs=160, flipped=0.5, seed=seed)
        kept += decide(fitted(data, 120), data.part(120, 160), range(40)).installed
    assert kept <= 1


def test_decision_with_repeated_random_labels(planted: Callable[..., Any]) -> None:
    """Every pair is there twice, with the same annotator and label. A label does not tell what its copy is."""
    kept = 0
    for seed in range(10):
        data, draws = planted(pairs=200, opposed=True, flipped=0.5, seed=seed), np.random.default_rng(seed)
        # The parts of the fit, the selection and the decision.
        order = np.concatenate([draws.permutation(part.repeat(2)) for part in np.split(np.arange(200), [160, 180])])
        names = [f"{data.names[number]} {number % 20}" for number in order]
        loss, contents = partial(dpo_loss, beta=1.0), [str(number) for number in order]
        rows, plain = data.rows[order], data.plain[order]
        pairs = LinearizedPairs(rows, plain, data.token, names, loss, contents=contents)
        torch.manual_seed(seed)
        space = latent.MarginalSpace(hidden=16, num_codes=4, annotators=True)
        space.build(data.head.weight.shape[1], data.head)
        fit(space, pairs.part(slice(360)), 40, 1e-2, pairs_per_annotator=4)
        kept += decide(space, pairs.part(slice(360, None)), contents[360:], pairs_per_annotator=4).installed
    assert kept == 0


@pytest.mark.parametrize(("flipped", "pairs"), [(0.0, 200), (0.2, 1200)])
def test_decision_keeps_planted_factors(flipped: float, pairs: int, planted: Callable[..., Any]) -> None:
    data, part = planted(pairs=pairs, flipped=flipped), pairs * 4 // 5
    decision = decide(fitted(data, part), data.part(part, pairs), range(pairs - part))
    assert decision.installed
    assert str(decision).startswith(f"kept the fitted codes: {pairs - part} held-out pairs of {pairs - part} prompts")
    assert decision.record()["reason"] == str(decision)


def test_gain_is_that_of_the_likelihood(planted: Callable[..., Any]) -> None:
    """Against a loop over pairs and codes in plain exponentials."""
    data = planted(pairs=60)
    space, part = fitted(data, 40), data.part(40, 60)
    gains = likelihood_gains(space, part)
    states, score = part.select(torch.arange(20))
    with torch.no_grad():
        prior, losses = space.log_prior(states.prompt).exp(), score.under_codes(space.codebook.weight)[0].losses
    for pair in range(20):
        likelihood = sum(float(prior[pair, code]) * math.exp(-float(losses[pair, code])) for code in range(4))
        assert float(gains[pair]) == pytest.approx(math.log(likelihood) - math.log(0.5), abs=1e-4)


def test_decision_standard_error_is_over_prompts(planted: Callable[..., Any]) -> None:
    """The jackknife over prompts of one to six pairs: the mean gain is computed again without each prompt."""
    data = planted(pairs=61)
    space, part = fitted(data, 40), data.part(40, 61)
    prompts = [prompt for prompt in range(6) for _ in range(prompt + 1)]
    gains = likelihood_gains(space, part).tolist()
    decision = decide(space, part, prompts)
    assert decision.gain == pytest.approx(fmean(gains), rel=1e-6)
    without = [
        fmean(gain for gain, own in zip(gains, prompts, strict=True) if own != left_out) for left_out in range(6)
    ]
    error = math.sqrt(5 / 6 * sum((each - fmean(gains)) ** 2 for each in without))
    assert decision.standard_error == pytest.approx(error, rel=1e-6)
    # 21 pairs count as 21^2 / (1 + 4 + 9 + 16 + 25 + 36) = 4.85 prompts of equal size.
    assert decision.needed == pytest.approx(stats.t.ppf(0.95, 21**2 / 91 - 1) * error, rel=1e-6)
    assert (decision.pairs, decision.prompts) == (21, 6)


def test_decision_of_equal_prompts(planted: Callable[..., Any]) -> None:
    data = planted(pairs=60)
    decision = decide(fitted(data, 40), data.part(40, 60), [number % 5 for number in range(20)])
    # The 95 % quantile of Student's t with 4 degrees of freedom, from a table.
    assert decision.needed == pytest.approx(2.1318 * decision.standard_error, rel=1e-4)


def test_decision_over_different_pairs(planted: Callable[..., Any]) -> None:
    """Twenty pairs of one prompt, of which every second is a copy."""
    data = planted(pairs=60)
    space, part = fitted(data, 40), data.part(40, 60)
    copies = [number // 2 for number in range(20)]
    decision, expected = decide(space, part, [0] * 20, contents=copies), decide(space, part, copies)
    assert decision.standard_error == expected.standard_error
    assert decision.needed == expected.needed
    assert (decision.pairs, decision.prompts, decision.different_pairs) == (20, 1, 10)
    assert "20 held-out pairs of 10 different pairs are likelier by" in str(decision)
    assert "a single pair cannot decide" in str(decide(space, part, [0] * 20, contents=[0] * 20))


def test_single_prompt_cannot_decide(planted: Callable[..., Any]) -> None:
    data = planted(pairs=200)
    decision = decide(fitted(data, 160), data.part(160, 200), [0] * 40)
    assert decision.gain > 0.1
    assert not decision.installed
    assert "a single prompt cannot decide" in str(decision)
    assert (decision.standard_error, decision.needed) == (None, None)


def test_decision_needs_more_than_a_gain() -> None:
    text = str(Decision(False, 0.01, 0.01, 0.0165, 40, 40))
    assert text.startswith("kept the plain start: 40 held-out pairs")
    assert "needed 0.0165" in text


@pytest.mark.parametrize("name", ["MLPSpace", "GaussianSpace", "GumbelSpace"])
def test_decision_of_other_spaces(name: str, planted: Callable[..., Any]) -> None:
    data = planted(pairs=300)
    torch.manual_seed(0)
    space = getattr(latent, name)(hidden=16, **({} if name == "MLPSpace" else {"num_codes": 4}))
    space.build(data.head.weight.shape[1], data.head)
    plain = copy.deepcopy(space)
    fit(space, data.part(0, 200), 20, 1e-2)
    assert decide(space, data.part(200, 300), range(100)).installed
    assert not decide(plain, data.part(200, 300), range(100)).installed
