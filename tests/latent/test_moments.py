"""Running moments against numpy over the pairs themselves, and what a network reads by them.

That devices hold the same ones is tested by whole runs, in tests/distributed/test_distributed.py.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpc_lightning.latent.moments import RunningMoments
from lpc_lightning.latent.networks import NetworkSettings, Prior

FEATURES = 5


def draw(pairs: int, seed: int = 0) -> Tensor:
    """Features that have much in common, on other scales each."""
    generator = torch.Generator().manual_seed(seed)
    scales, common = torch.tensor([[1.0, 0.1, 2.0, 0.5, 0.0], [0.5, 9.0, -3.0, 0.0, 2.0]], dtype=torch.float64)
    return common + scales * torch.randn(pairs, FEATURES, generator=generator, dtype=torch.float64)


def after(batches: list[Tensor], moments: RunningMoments | None = None) -> RunningMoments:
    """Moments that have met these steps' pairs."""
    moments = moments or RunningMoments(FEATURES).double()
    for batch in batches:
        moments(batch)
        moments.close_window()
    return moments


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_they_are_those_of_all_pairs_met(sizes: list[int]) -> None:
    met = draw(sum(sizes)).numpy()
    moments = after(list(draw(sum(sizes)).split(sizes)))
    assert moments.pairs == len(met)
    np.testing.assert_allclose(moments.mean, met.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.variance, met.var(0), rtol=1e-9, atol=1e-11)
    distances = [*(met - met.mean(0)), np.ones(FEATURES)]
    np.testing.assert_allclose(moments.deviation, np.sqrt(np.mean(np.square(distances), 0)), rtol=1e-10)
    new = draw(3, seed=1)
    expected = (new.numpy() - met.mean(0)) / np.sqrt(np.mean(np.square(distances), 0))
    np.testing.assert_allclose(moments(new), expected, rtol=1e-9, atol=1e-10)


def test_features_pass_unchanged_before_the_first_step() -> None:
    moments = RunningMoments(FEATURES).double()
    for _ in range(2):
        assert torch.equal(moments(draw(4)), draw(4))
    assert moments.pairs == 0
    moments.close_window()
    assert moments.pairs == 8


def test_micro_batches_are_one_batch_and_a_step_is_a_step() -> None:
    at_once, in_parts = (RunningMoments(FEATURES).double() for _ in range(2))
    for step in (draw(6), draw(6, seed=1)):
        whole = at_once(step)
        parts = [in_parts(part) for part in step.split([1, 3, 0, 2])]
        torch.testing.assert_close(torch.cat(parts), whole)  # each pair by the moments of the step before
        for moments in (at_once, in_parts):
            moments.close_window()
        torch.testing.assert_close(dict(in_parts.named_buffers()), dict(at_once.named_buffers()))


def test_nothing_counts_twice_and_nothing_in_eval_mode() -> None:
    moments = after([draw(6)])
    before = copy.deepcopy(moments.state_dict())
    moments.close_window()
    moments.eval()
    moments(draw(3, seed=1))
    moments.close_window()
    assert set(before) == {"pairs", "mean", "variance"}
    assert all(torch.equal(value, before[name]) for name, value in moments.state_dict().items())


def test_they_forget_what_lies_far_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past `PAIRS` a step joins so many: what came before fades by a constant factor."""
    monkeypatch.setattr(RunningMoments, "PAIRS", 12)
    old, new = draw(12) + 100, draw(40, seed=1)
    moments = after([old, *new.split(4)])
    assert moments.pairs == 12
    shares = [0.75**10 / 12] * 12 + [0.25 * 0.75 ** (9 - step) / 4 for step in range(10) for _ in range(4)]
    met = torch.cat([old, new]).numpy()
    mean = np.average(met, axis=0, weights=shares)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.variance, np.average((met - mean) ** 2, axis=0, weights=shares), rtol=1e-9)


def test_a_small_deviation_from_a_large_mean_is_not_lost_in_float32() -> None:
    moments = after([batch.float() for batch in (20 + 0.03 * draw(4000)).split(8)], RunningMoments(FEATURES))
    expected = (20 + 0.03 * draw(4000)).numpy().std(0)
    np.testing.assert_allclose(moments.variance.sqrt(), expected, rtol=0.02, atol=1e-5)


def test_one_pair_tells_nothing_of_deviations_and_explodes_nothing() -> None:
    moments = after([draw(1)])
    assert torch.equal(moments.variance, torch.zeros(FEATURES, dtype=torch.float64))
    torch.testing.assert_close(moments(draw(3)), (draw(3) - draw(1)) * 2**0.5)


def test_no_gradient_goes_through_them() -> None:
    moments, features = after([draw(6)]), draw(4, seed=1).requires_grad_()
    moments(features).sum().backward()
    moments.close_window()
    torch.testing.assert_close(features.grad, (1 / after([draw(6)]).deviation).expand(4, -1))
    assert not any(value.requires_grad for value in moments.state_dict().values())


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_they_stay_exact_whatever_the_weights_are(narrow: torch.dtype) -> None:
    features = draw(64).float()
    expected = after([features], RunningMoments(FEATURES)).state_dict()
    torch.set_default_dtype(narrow)  # as a trainer of bf16-true builds modules
    try:
        built = RunningMoments(FEATURES).to(narrow)
    finally:
        torch.set_default_dtype(torch.float32)
    for moments in (after([features], built), built.to(narrow), built.to(device="cpu", dtype=narrow)):
        for name, value in moments.state_dict().items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])
        assert moments(features.to(narrow)).dtype == torch.float32
    assert built.double().mean.dtype == torch.float64
    assert RunningMoments(FEATURES).to("meta").to_empty(device="cpu").to(narrow).mean.dtype == torch.float32


# What a network reads by them


def prompts(pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """States that are 99.5 % one vector, and the class of each, which is in the rest."""
    width, generator = 48, torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(7)
    common, *centres = torch.randn(5, width, generator=fixed)
    classes = torch.randint(4, (pairs,), generator=generator)
    own = torch.stack(centres)[classes] + 0.7 * torch.randn(pairs, width, generator=generator)
    return 20 * common + own, classes


def accuracy(standardise: bool) -> float:
    """Of a prior that is trained on the classes as long as on a few hundred pairs."""
    torch.manual_seed(0)
    prior = Prior(48, 4, NetworkSettings(hidden=32, detach=True, standardise=standardise))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3)
    for step in range(60):
        states, classes = prompts(8, seed=step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(prior(states), classes).backward()
        if prior.moments is not None:
            prior.moments.close_window()
        optimizer.step()
    states, classes = prompts(500, seed=1000)
    return (prior.eval()(states).argmax(-1) == classes).float().mean().item()


def test_what_tells_prompts_apart_is_read_behind_what_all_have_in_common() -> None:
    states, _ = prompts(500, seed=0)
    states = states / states.square().mean(-1, keepdim=True).sqrt()
    assert states.mean(0).square().mean() > 0.99
    assert accuracy(standardise=True) > 0.95
    assert accuracy(standardise=False) < 0.5
