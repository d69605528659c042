"""Random choices that are the same in every process, under every PYTHONHASHSEED and on every Python version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def stable_hash(*parts: object) -> int:
    """A 64-bit hash of the texts of `parts`."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "big")


def stream(*parts: object) -> Random:
    """The random stream that belongs to `parts`."""
    return Random(stable_hash(*parts))


# Python promises the same numbers across versions for `Random.random` alone, not for `choice` or `shuffle`.
def pick(rng: Random, items: Sequence[T]) -> T:
    """One of `items`, each with the same probability."""
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """`items` in random order."""
    return sorted(items, key=lambda _: rng.random())
