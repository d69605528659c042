"""Types of rows and of their faults."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

Row: TypeAlias = dict[str, Any]
"""One row: cells by column name."""


def entry_of(row: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return an entry of a row by its name, or `default` if it has none.

    Args:
        row: Cells by column name.
        name: A column, or a path such as `meta.vote`: the entry `vote` of the column `meta`. A column of the whole
            name, as in a flattened table, comes first.
        default: Value if there is no such entry. An entry may be None.
    """
    if name in row:
        return row[name]
    first, _, rest = name.partition(".")
    inner = row.get(first)
    return entry_of(inner, rest, default) if isinstance(inner, Mapping) else default


def is_missing(cell: Any) -> bool:
    """Return True for a cell without a value. Tables have NaN in place of a missing one."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


WHOLE = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,15}))\.0+")
"""A whole number in the form of pandas for a column that lacks a value, as in CSV files."""


def label_text(cell: Any) -> str:
    """Return a label as text, empty if it is missing. Return `3` for 3.0, as a number or as a text.

    Tables have 3.0 for 3 in a column of whole numbers that lacks one. In CSV files this is a text.
    """
    if is_missing(cell):
        return ""
    whole = WHOLE.fullmatch(cell) if isinstance(cell, str) else None
    if whole is not None:
        return str(int(whole[1]))
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


SKIP = "`--data.bad_rows skip` (evaluate and adapt: `--bad_rows skip`)"
"""Option that leaves out rows that cannot be used, for errors."""

Reason: TypeAlias = Literal[
    "invalid UTF-8",
    "invalid JSON",
    "not an object",
    "repeated column",
    "wrong number of fields",
    "missing answer",
    "empty answer",
    "equal answers",
    "no prompt",
    "empty prompt",
    "prompt does not end in a user turn",
    "prompt differs from the conversations",
    "conversations differ before the last turn",
    "conversation does not end in an answer",
    "unknown role",
    "unknown form",
    "unknown label",
    "invalid weight",
    "invalid margin",
    "invalid score",
    "ambiguous columns",
    "ambiguous message",
    "text beside the content",
    "message list as text",
    "rendered text",
    "wrong type",
    "invalid text",
    "refused by the chat template",
    "left out by the chat template",
    "two think blocks",
    "end token in answer",
]
"""Reasons why a row cannot be used. They are keys of counters and, as `data/bad/...`, names of metrics."""


class DataError(ValueError):
    """Raised when data cannot be used. The message has the place, the value, what was expected and what to do."""


class BadRow(ValueError):  # noqa: N818 - a bad row is counted, and is an error only if the settings require it
    """Raised for one row that cannot be used.

    Args:
        reason: Key of the counter for this row.
        detail: What was found in the row, and what was expected.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


def undecoded(text: str, where: str) -> BadRow | None:
    """Return the fault of a text that holds bytes which are not UTF-8, or None.

    Args:
        text: Text decoded from UTF-8 with `errors="surrogateescape"`.
        where: What the text is, for the detail.
    """
    try:
        text.encode()  # fast, and fails for the substitutes of the bytes
    except UnicodeEncodeError:
        try:
            text.encode(errors="surrogateescape").decode()
        except UnicodeDecodeError as error:
            return BadRow("invalid UTF-8", f"{error.reason} at byte {error.start} of {where}")
        except UnicodeEncodeError:  # a surrogate that an escape of JSON has made
            pass
    return None


def check_text(text: str) -> None:
    """Check that a text can be encoded.

    Raises:
        BadRow: It has half of a surrogate pair, from an escape of JSON or from bytes that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        detail = f"found half of a surrogate pair at character {error.start} of {text[:40]!r}"
        raise BadRow("invalid text", detail) from error


class Tie(ValueError):  # noqa: N818 - a tie is no error: the row is dropped and counted
    """Raised for one row whose label prefers neither answer."""


OnBad: TypeAlias = Callable[[str, BadRow], None]
"""Callback for a row that cannot be parsed, with its place and its fault."""
