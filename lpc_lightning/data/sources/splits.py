"""Selection of rows by a split column, and a hold-out of prompts or pairs by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

from lpc_lightning.data.sources.locations import DEFAULT_SPLIT, Location
from lpc_lightning.data.sources.rows import DataError, Row, label_text
from lpc_lightning.types import Message, PreferenceExample

SPLIT_COLUMN = "split"
"""Default name of the column with the split of each row. Rows may lack it."""
SEED = 0
"""Seed of the hold-out. Another one would move prompts between training and validation."""


def split_of(row: Row, split_column: str = "split") -> str:
    """Return the value of a row's split column. Return `train` if the column is absent or empty."""
    return label_text(row.get(split_column)) or "train"


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


def refuse_marked(rows: Iterable[tuple[str, Row]], split_column: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of an own split `train`. `datasets` puts files there whose names tell no split.

    Raises:
        DataError: The split column of a row marks it for validation or test. Such rows would be trained on.
    """
    for place, row in rows:
        if (found := split_of(row, split_column)) in (*VALIDATION_NAMES, "test"):
            raise DataError(
                f"{place}: found {found!r} in the column {split_column!r} of a row that belongs to the split "
                f"{DEFAULT_SPLIT!r} of its folder or data set, expected {DEFAULT_SPLIT!r} or no value. To read the "
                "column, set data.path to the files: a file, a pattern or a list. To use all rows, set "
                "data.split_column to a name that no row has."
            )
        yield place, row


def split_names(location: Location, split_column: str = "split") -> set[str]:
    """Return the names of a location's splits.

    They are its own splits if it has any, otherwise the values of the split column in all rows. Rows without a value
    do not count.
    """
    if location.has_splits:
        return set(location.own_splits())
    rows = location.rows(None, lambda place, fault: None, only=split_column)
    return {name for _, row in rows if (name := label_text(row.get(split_column)))}


def check_split_column(locations: Iterable[Location], split_column: str, setting: str) -> None:
    """Check that some row has a value in a split column of another name than the default one.

    Args:
        locations: Locations of all stages. Those with splits of their own do not read the column.
        split_column: Name of the column with the split.
        setting: Setting that names it, for the error.

    Raises:
        DataError: No row has a value there, so that the rows of all splits would belong to one.
    """
    if split_column == SPLIT_COLUMN or any(each.has_splits or split_names(each, split_column) for each in locations):
        return
    raise DataError(
        f"{setting}: found {split_column!r}, in which no row has a value, expected the column with the split of each "
        "row. Correct the name, or leave it out if the rows have no splits."
    )


def find_split(location: Location, wanted: Sequence[str], split_column: str, setting: str) -> str | None:
    """Return the split of a location to read: the first of several names that it has, otherwise its only split.

    Args:
        location: The location, with splits of its own or a split column.
        wanted: Names of the split.
        split_column: Name of the column with the split.
        setting: Setting that chooses the split, for the error.

    Returns:
        Name of the split. None if the location has neither splits nor values in the split column.

    Raises:
        DataError: It has several splits, but none of the names.
    """
    names = split_names(location, split_column)
    if not names:
        return None
    if not location.has_splits and names.isdisjoint(wanted):  # rows without a value have a split, too
        names = {split_of(row, split_column) for _, row in location.rows(None, lambda place, fault: None)}
    if len(names) > 1 and names.isdisjoint(wanted):
        raise DataError(
            f"{setting}: found the splits {', '.join(sorted(names))}, expected {' or '.join(wanted)}, or a single "
            f"split. Set {setting} to one of them."
        )
    return next((name for name in wanted if name in names), min(names))


def prompt_rank(prompt: Sequence[Message] | str) -> int:
    """Return the place of a prompt in a random order: a hash below 2^64 of its text.

    White space around a turn does not count, because many chat templates remove it.

    Args:
        prompt: A conversation, or a text, which counts as one user turn.
    """
    turns = [("user", prompt)] if isinstance(prompt, str) else [(turn["role"], turn["content"]) for turn in prompt]
    return _rank([SEED, [[role, content.strip()] for role, content in turns]])


def pair_rank(example: PreferenceExample) -> int:
    """Return the place of a pair in a random order (see `prompt_rank`). It does not depend on the label."""
    return _rank([prompt_rank(example.prompt), sorted([example.chosen.strip(), example.rejected.strip()])])


def _rank(content: list[Any]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(content).encode()).digest()[:8], "big")


HoldOut = Literal["prompt", "pair"]
RANKS: dict[HoldOut, Callable[[PreferenceExample], int]] = {
    "prompt": lambda example: prompt_rank(example.prompt),
    "pair": pair_rank,
}
"""Ranks by which examples are held out. Examples of one rank are on the same side."""


def held_out(rank: int, share: float) -> bool:
    """Return True if a rank belongs to the held-out share.

    The result depends only on the text, in every run and independent of the other data.

    Args:
        rank: A rank below 2^64 (see `RANKS`).
        share: Share of ranks to hold out, in [0, 1].

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"data.validation_share: found {share}, expected the share to hold out, between 0 and 1.")
    return rank < share * 2**64


def first_held_out(ranks: Iterable[int], share: float) -> int | None:
    """Return the rank to hold out if the share selects none of a few ranks.

    Args:
        ranks: The ranks. They are read up to the first one that the share selects.
        share: Share of ranks to hold out, above 0.

    Returns:
        The lowest rank. None if the share selects a rank, or if there are fewer than two different ranks.
    """
    seen: set[int] = set()
    for rank in ranks:
        if held_out(rank, share):
            return None
        seen.add(rank)
    return min(seen) if len(seen) > 1 else None
