"""Numbers that change over training: g, tau and the KL weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod


class Schedule(ABC):
    """A number as a function of training progress: 0 at the first optimizer step, 1 at the last."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """The value at `progress`, from 0 to 1."""


class Constant(Schedule):
    """The same value throughout."""

    def __init__(self, value: float) -> None:
        """Hold `value`.

        Args:
            value: The value.
        """
        self.value = value

    def __call__(self, progress: float) -> float:
        """The value."""
        return self.value


class Linear(Schedule):
    """A straight line from `start` to `end`."""

    def __init__(self, start: float = 0.0, end: float = 1.0) -> None:
        """Set both ends.

        Args:
            start: Value at the first optimizer step.
            end: Value at the last optimizer step.
        """
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        """`start + (end - start) progress`."""
        return (1 - progress) * self.start + progress * self.end


class Cosine(Linear):
    """Half a cosine from `start` to `end`: flat at both ends."""

    def __call__(self, progress: float) -> float:
        """The line at `(1 - cos(pi progress)) / 2`."""
        return super().__call__((1 - math.cos(math.pi * progress)) / 2)


class Exponential(Linear):
    """A geometric path from `start` to `end`, both above zero: the usual way to anneal tau."""

    def __init__(self, start: float = 1.0, end: float = 0.1) -> None:
        """Set both ends.

        Args:
            start: Value at the first optimizer step, above zero.
            end: Value at the last optimizer step, above zero.

        Raises:
            ValueError: An end is not above zero.
        """
        if min(start, end) <= 0:
            raise ValueError(f"Exponential: found start {start} and end {end}, expected both above zero.")
        super().__init__(start, end)

    def __call__(self, progress: float) -> float:
        """`start^(1 - progress) end^progress`."""
        return self.start ** (1 - progress) * self.end**progress


class WarmUp(Schedule):
    """A straight line from 0 to `value` over the first `share` of training, then `value`."""

    def __init__(self, value: float, share: float = 0.1) -> None:
        """Set the plateau and when it is reached.

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
        """`value min(1, progress / share)`."""
        return self.value * min(1.0, progress / self.share)


def as_schedule(value: float | Schedule) -> Schedule:
    """A plain number is a `Constant`."""
    return value if isinstance(value, Schedule) else Constant(value)
