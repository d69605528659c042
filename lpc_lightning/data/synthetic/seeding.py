"""Random choices that are equal in all processes, for all values of PYTHONHASHSEED and in all Python versions."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from lpc_lightning.seeding import derive

T = TypeVar("T")


def stream(*parts: object) -> Random:
    """Return a random generator whose seed is derived from `parts`."""
    return Random(derive(*parts))


# Python guarantees equal numbers across versions only for `Random.random`, not for `choice` or `shuffle`.
def pick(rng: Random, items: Sequence[T]) -> T:
    """Return one of `items`, each with the same probability."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """Return `items` in random order."""
    return sorted(items, key=lambda _: rng.random())
