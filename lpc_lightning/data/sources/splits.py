"""Selection of rows by a split column, and a hold-out of prompts by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from lpc_lightning.data.sources.locations import Location
from lpc_lightning.data.sources.rows import Row
from lpc_lightning.types import Message


def split_of(row: Row, split_column: str = "split") -> str:
    """Return the value of a row's split column. Return `train` if the column is absent or empty."""
    value = row.get(split_column)
    return "train" if value is None or value == "" else str(value)


def select_split(
    rows: Iterable[tuple[str, Row]],
    split: str,
    split_column: str = "split",
    on_other: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Row]]:
    """Yield the rows that belong to `split`.

    Args:
        rows: Rows with their places, as `read_rows` yields them.
        split: Value to select, such as `train` or `test`.
        split_column: Name of the column with the split.
        on_other: Callback with the split of each row that is not selected.
    """
    for place, row in rows:
        row_split = split_of(row, split_column)
        if row_split == split:
            yield place, row
        elif on_other is not None:
            on_other(row_split)


VALIDATION_NAMES = ("validation", "valid", "val", "dev")
"""Splits that are used for validation, in this order, if no setting names one."""


def split_names(location: Location, split_column: str = "split") -> set[str]:
    """Return the names of a location's splits.

    They are its own splits if it has any, otherwise the values of the split column in all rows. Rows without a value
    do not count.
    """
    if location.splits is not None:
        return set(location.own_splits())
    rows = location.rows(None, lambda place, fault: None, only=split_column)
    return {split_of(row, split_column) for _, row in rows if row.get(split_column) not in (None, "")}


def prompt_rank(prompt: Sequence[Message] | str, seed: int = 0) -> int:
    """Return the place of a prompt in a random order: a hash below 2^64 of its text and the seed.

    Args:
        prompt: A conversation, or a text, which counts as one user turn.
        seed: Seed of the hash.
    """
    turns = [["user", prompt]] if isinstance(prompt, str) else [[turn["role"], turn["content"]] for turn in prompt]
    digest = hashlib.sha256(json.dumps([seed, turns]).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def held_out(prompt: Sequence[Message] | str, share: float, seed: int = 0) -> bool:
    """Return True if a prompt belongs to the held-out share.

    The result depends only on the prompt's text and the seed. So all pairs with the same prompt are on the same side,
    in every run and independent of the other data.

    Args:
        prompt: A conversation, or a text, which counts as one user turn.
        share: Share of prompts to hold out, in [0, 1].
        seed: Seed of the hash. A different seed holds out different prompts.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected the share of prompts to hold out, between 0 and 1")
    return prompt_rank(prompt, seed) < share * 2**64


def first_held_out(prompts: Iterable[Sequence[Message] | str], share: float, seed: int = 0) -> int | None:
    """Return the rank of the prompt to hold out if the share selects none of a few prompts.

    Args:
        prompts: The prompts. They are read up to the first one that the share selects.
        share: Share of prompts to hold out, above 0.
        seed: Seed of the hash.

    Returns:
        The lowest rank. None if the share selects a prompt, or if there are fewer than two different prompts.
    """
    ranks: set[int] = set()
    for prompt in prompts:
        if held_out(prompt, share, seed):
            return None
        ranks.add(prompt_rank(prompt, seed))
    return min(ranks) if len(ranks) > 1 else None
