"""Random choices that are the same in every process, under every PYTHONHASHSEED and on every Python version."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from lpc_lightning.seeding import derive

T = TypeVar("T")


def stream(*parts: object) -> Random:
    """The random stream that belongs to `parts`."""
    return Random(derive(*parts))


# Python promises the same numbers across versions for `Random.random` alone, not for `choice` or `shuffle`.
def pick(rng: Random, items: Sequence[T]) -> T:
    """One of `items`, each with the same probability."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """`items` in random order."""
    return sorted(items, key=lambda _: rng.random())
