"""Running moments against numpy, and a network that reads features standardized by them.

The equality of the moments on all devices is tested with whole runs, in tests/distributed/test_distributed.py.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lpc_lightning.latent.networks import NetworkSettings, Prior, RunningMoments

FEATURES = 5


def draw(pairs: int, seed: int = 0) -> Tensor:
    """Draw features with a large common part and different scales."""
    generator = torch.Generator().manual_seed(seed)
    scales, common = torch.tensor([[1.0, 0.1, 2.0, 0.5, 0.0], [0.5, 9.0, -3.0, 0.0, 2.0]], dtype=torch.float64)
    return common + scales * torch.randn(pairs, FEATURES, generator=generator, dtype=torch.float64)


def after(batches: list[Tensor], moments: RunningMoments | None = None) -> RunningMoments:
    """Return moments updated with one batch per step."""
    moments = moments or RunningMoments(FEATURES).double()
    for batch in batches:
        moments(batch)
        moments.update()
    return moments


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_moments_match_numpy(sizes: list[int]) -> None:
    data = draw(sum(sizes)).numpy()
    moments = after(list(draw(sum(sizes)).split(sizes)))
    assert moments.pairs == len(data)
    np.testing.assert_allclose(moments.mean, data.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.variance, data.var(0), rtol=1e-9, atol=1e-11)
    distances = [*(data - data.mean(0)), np.ones(FEATURES)]
    np.testing.assert_allclose(moments.deviation, np.sqrt(np.mean(np.square(distances), 0)), rtol=1e-10)
    new = draw(3, seed=1)
    expected = (new.numpy() - data.mean(0)) / np.sqrt(np.mean(np.square(distances), 0))
    np.testing.assert_allclose(moments(new), expected, rtol=1e-9, atol=1e-10)


def test_moments_before_first_step() -> None:
    moments = RunningMoments(FEATURES).double()
    for _ in range(2):
        assert torch.equal(moments(draw(4)), draw(4))
    assert moments.pairs == 0
    moments.update()
    assert moments.pairs == 8


def test_moments_of_micro_batches() -> None:
    at_once, in_parts = (RunningMoments(FEATURES).double() for _ in range(2))
    for step in (draw(6), draw(6, seed=1)):
        whole = at_once(step)
        parts = [in_parts(part) for part in step.split([1, 3, 0, 2])]
        torch.testing.assert_close(torch.cat(parts), whole)  # standardized by the moments of the previous step
        for moments in (at_once, in_parts):
            moments.update()
        torch.testing.assert_close(dict(in_parts.named_buffers()), dict(at_once.named_buffers()))


def test_moments_ignore_eval_mode() -> None:
    moments = after([draw(6)])
    before = copy.deepcopy(moments.state_dict())
    moments.update()
    moments.eval()
    moments(draw(3, seed=1))
    moments.update()
    assert set(before) == {"pairs", "mean", "variance"}
    assert all(torch.equal(value, before[name]) for name, value in moments.state_dict().items())


def test_moments_forget_old_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `PAIRS`, the weight of old pairs decreases by a constant factor per step."""
    monkeypatch.setattr(RunningMoments, "PAIRS", 12)
    old, new = draw(12) + 100, draw(40, seed=1)
    moments = after([old, *new.split(4)])
    assert moments.pairs == 12
    shares = [0.75**10 / 12] * 12 + [0.25 * 0.75 ** (9 - step) / 4 for step in range(10) for _ in range(4)]
    data = torch.cat([old, new]).numpy()
    mean = np.average(data, axis=0, weights=shares)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.variance, np.average((data - mean) ** 2, axis=0, weights=shares), rtol=1e-9)


def test_moments_small_variance_in_float32() -> None:
    moments = after([batch.float() for batch in (20 + 0.03 * draw(4000)).split(8)], RunningMoments(FEATURES))
    expected = (20 + 0.03 * draw(4000)).numpy().std(0)
    np.testing.assert_allclose(moments.variance.sqrt(), expected, rtol=0.02, atol=1e-5)


def test_moments_after_one_pair() -> None:
    moments = after([draw(1)])
    assert torch.equal(moments.variance, torch.zeros(FEATURES, dtype=torch.float64))
    torch.testing.assert_close(moments(draw(3)), (draw(3) - draw(1)) * 2**0.5)


def test_moments_pass_no_gradient() -> None:
    moments, features = after([draw(6)]), draw(4, seed=1).requires_grad_()
    moments(features).sum().backward()
    moments.update()
    torch.testing.assert_close(features.grad, (1 / after([draw(6)]).deviation).expand(4, -1))
    assert not any(value.requires_grad for value in moments.state_dict().values())


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_moments_keep_float32(narrow: torch.dtype) -> None:
    features = draw(64).float()
    expected = after([features], RunningMoments(FEATURES)).state_dict()
    torch.set_default_dtype(narrow)  # as in a trainer with precision bf16-true
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


# A network that reads standardized features


def prompts(pairs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw states and their classes. 99.5 % of each state is one common vector, and the rest depends on the class."""
    width, generator = 48, torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(7)
    common, *centres = torch.randn(5, width, generator=fixed)
    classes = torch.randint(4, (pairs,), generator=generator)
    own = torch.stack(centres)[classes] + 0.7 * torch.randn(pairs, width, generator=generator)
    return 20 * common + own, classes


def accuracy(standardize: bool) -> float:
    """Train a prior on the classes, for as many steps as a few hundred pairs give, and return its accuracy."""
    torch.manual_seed(0)
    prior = Prior(48, 4, NetworkSettings(hidden=32, detach=True, standardize=standardize))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3)
    for step in range(60):
        states, classes = prompts(8, seed=step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(prior(states), classes).backward()
        if prior.moments is not None:
            prior.moments.update()
        optimizer.step()
    states, classes = prompts(500, seed=1000)
    return (prior.eval()(states).argmax(-1) == classes).float().mean().item()


def test_prior_learns_small_differences() -> None:
    states, _ = prompts(500, seed=0)
    states = states / states.square().mean(-1, keepdim=True).sqrt()
    assert states.mean(0).square().mean() > 0.99
    assert accuracy(standardize=True) > 0.95
    assert accuracy(standardize=False) < 0.5


def test_moments_under_weight_averaging() -> None:
    """An average of buffers counts the pairs that it has averaged: p <- 0.999 p + 0.001 q, by hand in float64."""
    averaged, expected, decay = RunningMoments(FEATURES), 32.0, 0.999
    model = after([draw(32)])
    averaged.load_state_dict(model.state_dict())
    for _ in range(20):
        model = after([draw(32)], model)
        for value, now in zip(averaged.buffers(), model.buffers(), strict=True):
            value.copy_(decay * value + (1 - decay) * now)
        expected = decay * expected + (1 - decay) * float(model.pairs)
    assert float(averaged.pairs) == pytest.approx(expected, rel=1e-5)
    assert expected > 38
