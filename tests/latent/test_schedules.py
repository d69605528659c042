"""Schedules at their ends and in between."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lpc_lightning.latent import (
    Constant,
    Cosine,
    ExpectedSpace,
    Exponential,
    GaussianSpace,
    GumbelSpace,
    Linear,
    PosteriorOnlySpace,
    PriorOnlySpace,
    Schedule,
    VectorSpace,
    WarmUp,
)
from lpc_lightning.latent.schedules import as_schedule

HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(0.3), {0.0: 0.3, 0.5: 0.3, 1.0: 0.3}),
        (Linear(), {0.0: 0.0, 0.25: 0.25, 0.5: 0.5, 1.0: 1.0}),
        (Linear(3.0, -1.0), {0.0: 3.0, 0.25: 2.0, 0.5: 1.0, 1.0: -1.0}),
        (Cosine(), {0.0: 0.0, 0.25: (1 - HALF) / 2, 0.5: 0.5, 0.75: (1 + HALF) / 2, 1.0: 1.0}),
        (Cosine(2.0, 6.0), {0.0: 2.0, 1 / 3: 3.0, 0.5: 4.0, 2 / 3: 5.0, 1.0: 6.0}),
        (Exponential(), {0.0: 1.0, 0.5: math.sqrt(0.1), 1.0: 0.1}),
        (Exponential(4.0, 0.25), {0.0: 4.0, 0.25: 2.0, 0.5: 1.0, 0.75: 0.5, 1.0: 0.25}),
        (WarmUp(0.8), {0.0: 0.0, 0.05: 0.4, 0.1: 0.8, 0.5: 0.8, 1.0: 0.8}),
        (WarmUp(2.0, share=0.5), {0.0: 0.0, 0.25: 1.0, 0.5: 2.0, 1.0: 2.0}),
        (WarmUp(2.0, share=1.0), {0.0: 0.0, 0.75: 1.5, 1.0: 2.0}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else "",
)
def test_schedule_values(schedule: Schedule, values: dict[float, float]) -> None:
    for progress, value in values.items():
        assert schedule(progress) == pytest.approx(value, abs=1e-15, rel=1e-14)


@pytest.mark.parametrize("schedule", [Linear(0.3, 0.7), Cosine(0.3, 0.7), Exponential(0.3, 0.7)])
def test_schedule_ends_exact(schedule: Schedule) -> None:
    assert (schedule(0.0), schedule(1.0)) == (0.3, 0.7)


def test_as_schedule_number_or_schedule() -> None:
    assert as_schedule(0.25)(0.6) == 0.25
    assert as_schedule(0)(0.6) == 0
    line = Linear()
    assert as_schedule(line) is line


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_exponential_ends_not_above_zero(start: float, end: float) -> None:
    with pytest.raises(ValueError, match=f"Exponential: found start {start} and end {end}, expected both above zero"):
        Exponential(start, end)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_warm_up_share_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match=f"WarmUp: found share {share}"):
        WarmUp(1.0, share)


TAU = "a number above 0"
ABOVE = "a number of at least 0"


@pytest.mark.parametrize("step", ["first", "last"])
@pytest.mark.parametrize(
    ("kind", "setting", "value", "expected"),
    [
        *((kind, "tau", 0.0, TAU) for kind in (GumbelSpace, PosteriorOnlySpace, PriorOnlySpace)),
        *((kind, "g", value, "a share from 0 to 1") for kind in (GumbelSpace, GaussianSpace) for value in (-0.5, 1.5)),
        *((kind, "kl_weight", -0.5, ABOVE) for kind in (GumbelSpace, ExpectedSpace, GaussianSpace)),
    ],
)
def test_schedule_of_setting_out_of_range(kind: Any, setting: str, value: float, expected: str, step: str) -> None:
    """Of a number at the first step, of a line at its wrong end."""
    schedule = value if step == "first" else Linear(1.0, value)
    with pytest.raises(
        ValueError, match=rf"^latent\.{setting}: found {value} at the {step} step, expected {expected}\.$"
    ):
        kind(**{setting: schedule})


def test_schedule_of_setting_at_its_limits() -> None:
    space = GumbelSpace(tau=Exponential(1.0, 1e-3), g=Linear(1.0, 0.0), kl_weight=WarmUp(0.5), free_bits=0.0)
    assert [space.tau(1.0), space.g(1.0), space.divergence.weight(0.0)] == [1e-3, 0.0, 0.0]


@pytest.mark.parametrize(("kind", "setting"), [(ExpectedSpace, "free_bits"), (VectorSpace, "init_logit_std")])
def test_setting_below_zero(kind: Any, setting: str) -> None:
    with pytest.raises(ValueError, match=rf"latent\.{setting}: found -1\.0, expected"):
        kind(**{setting: -1.0})
