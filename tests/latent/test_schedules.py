"""Schedules at their ends and in between."""

from __future__ import annotations

import math

import pytest

from lpc_lightning.latent import Constant, Cosine, Exponential, Linear, Schedule, WarmUp
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
