"""Which side of a split a row or a prompt stands on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence

from lpc_lightning.data.sources.rows import Row
from lpc_lightning.types import Message


def split_of(row: Row, split_column: str = "split") -> str:
    """The split that a row names in `split_column`; `train` where the column is absent or empty."""
    value = row.get(split_column)
    return "train" if value is None or value == "" else str(value)


def select_split(
    rows: Iterable[tuple[str, Row]],
    split: str,
    split_column: str = "split",
    on_other: Callable[[str], None] | None = None,
) -> Iterator[tuple[str, Row]]:
    """The rows that belong to `split`.

    Args:
        rows: Rows with their places, as `read_rows` gives them.
        split: The value wanted, such as `train` or `test`.
        split_column: Column that holds it.
        on_other: Told the split of each row left out.
    """
    for place, row in rows:
        found = split_of(row, split_column)
        if found == split:
            yield place, row
        elif on_other is not None:
            on_other(found)


def held_out(prompt: Sequence[Message] | str, share: float, seed: int = 0) -> bool:
    """Whether a prompt belongs to the held-out share.

    It depends on the prompt's text and the seed alone, so every pair with one prompt stands on one side, in every run
    and whatever else the data holds.

    Args:
        prompt: A conversation, or a text, which counts as one user turn.
        share: Share of prompts to hold out, in [0, 1].
        seed: Another seed holds out other prompts.

    Raises:
        ValueError: `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share}: expected the share of prompts to hold out, between 0 and 1")
    turns = [["user", prompt]] if isinstance(prompt, str) else [[turn["role"], turn["content"]] for turn in prompt]
    digest = hashlib.sha256(json.dumps([seed, turns]).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
