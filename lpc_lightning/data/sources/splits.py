"""Selection of rows by a split column, and a hold-out of prompts by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

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
    turns = [["user", prompt]] if isinstance(prompt, str) else [[turn["role"], turn["content"]] for turn in prompt]
    digest = hashlib.sha256(json.dumps([seed, turns]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
