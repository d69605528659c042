"""Schedules of the numbers that change over training (g, tau and the KL weight), and the KL penalty."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor


class Schedule(ABC):
    """A number as a function of training progress: 0 at the first optimizer step, 1 at the last."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the value at `progress`, from 0 to 1."""


class Constant(Schedule):
    """Schedule with one constant value."""

    def __init__(self, value: float) -> None:
        """Store the value.

        Args:
            value: The value.
        """
        self.value = value

    def __call__(self, progress: float) -> float:
        """Return the value."""
        return self.value


class Linear(Schedule):
    """Straight line from `start` to `end`."""

    def __init__(self, start: float = 0.0, end: float = 1.0) -> None:
        """Store both ends.

        Args:
            start: Value at the first optimizer step.
            end: Value at the last optimizer step.
        """
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """Return `start + (end - start) progress`."""
        return (1 - progress) * self.start + progress * self.end


class Cosine(Linear):
    """Half a cosine from `start` to `end`, flat at both ends."""

    def __call__(self, progress: float) -> float:
        """Return the value of the line at `(1 - cos(pi progress)) / 2`."""
        return super().__call__((1 - math.cos(math.pi * progress)) / 2)


class Exponential(Linear):
    """Geometric path from `start` to `end`, both above zero. It is the usual way to anneal tau."""

    def __init__(self, start: float = 1.0, end: float = 0.1) -> None:
        """Store both ends.

        Args:
            start: Value at the first optimizer step, above zero.
            end: Value at the last optimizer step, above zero.

        Raises:
            ValueError: `start` or `end` is not above zero.
        """
        if min(start, end) <= 0:
            raise ValueError(f"Exponential: found start {start} and end {end}, expected both above zero.")
        super().__init__(start, end)

    def __call__(self, progress: float) -> float:
        """Return `start^(1 - progress) end^progress`."""
        return self.start ** (1 - progress) * self.end**progress


class WarmUp(Schedule):
    """Straight line from 0 to `value` over the first `share` of training, then constant at `value`."""

    def __init__(self, value: float, share: float = 0.1) -> None:
        """Store the final value and the length of the warm-up.

        Args:
            value: Value after the warm-up.
            share: Length of the warm-up as a share of training, above 0 and at most 1.

        Raises:
            ValueError: `share` is out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"WarmUp: found share {share}, expected above 0 and at most 1.")
        self.value, self.share = value, share

    def __call__(self, progress: float) -> float:
        """Return `value min(1, progress / share)`."""
        return self.value * min(1.0, progress / self.share)


def as_schedule(value: float | Schedule) -> Schedule:
    """Convert a plain number to a `Constant`. Return a schedule unchanged."""
    return value if isinstance(value, Schedule) else Constant(value)


def checked_schedule(
    setting: str, value: float | Schedule, is_valid: Callable[[float], bool], expected: str
) -> Schedule:
    """Convert a setting to a schedule whose values at both ends of training are valid.

    Raises:
        ValueError: One of the two values is not valid.
    """
    schedule = as_schedule(value)
    for progress, step in ((0.0, "first"), (1.0, "last")):
        number = schedule(progress)
        if not is_valid(number):
            raise ValueError(f"latent.{setting}: found {number} at the {step} step, expected {expected}.")
    return schedule


def temperature_schedule(tau: float | Schedule) -> Schedule:
    """Convert `tau` to a schedule. It divides logits, so it must be above zero."""
    return checked_schedule("tau", tau, lambda value: 0 < value < math.inf, "a number above 0")


def prior_share_schedule(g: float | Schedule | None) -> Schedule:
    """Convert `g`, the share of the prior in a mixture, to a schedule. None: the line from 0 to 1."""
    return checked_schedule("g", Linear() if g is None else g, lambda value: 0 <= value <= 1, "a share from 0 to 1")


class WeightedKL:
    """Penalty that a latent adds to the loss of each pair: lambda max(KL, free bits)."""

    def __init__(self, weight: float | Schedule, free_bits: float) -> None:
        """Store the settings.

        Args:
            weight: lambda, or its schedule.
            free_bits: KL in nats below which the penalty is constant (Kingma et al., 2016, arXiv 1606.04934, app. C.8).

        Raises:
            ValueError: A setting is negative.
        """
        if not 0 <= free_bits < math.inf:
            raise ValueError(f"latent.free_bits: found {free_bits}, expected a number of at least 0.")
        self.weight = checked_schedule(
            "kl_weight", weight, lambda value: 0 <= value < math.inf, "a number of at least 0"
        )
        self.free_bits = free_bits

    def __call__(self, kl: Tensor, progress: float) -> Tensor:
        """Compute the penalty (B,) from the KL (B,) in nats, at training progress `progress`."""
        return self.weight(progress) * kl.clamp_min(self.free_bits)
