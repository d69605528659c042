"""Conversion of cells to messages: names of roles, parts of a content, and lists that are written as text."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.types import Message

_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"),
}
ROLES = {name: role for role, names in _NAMES.items() for name in names}
"""Role by its name in a data set, in lower case."""
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
OTHER_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys of what a message says beside its content. It would be in no text."""
LIST_AS_TEXT = "message list as text"
CONTENT_PARTS = "content parts joined"


def is_messages(cell: Any) -> bool:
    """Return True for a list of objects that is not empty."""
    return isinstance(cell, Sequence) and bool(cell) and all(isinstance(item, dict) for item in cell)


def to_messages(cell: Sequence[Any], forms: list[str]) -> tuple[Message, ...]:
    """Convert a list of objects to messages.

    Args:
        cell: Objects like `{"role": "user", "content": "Hi"}` or `{"from": "human", "value": "Hi"}`.
        forms: List to which the name of the form is appended if a content has parts.

    Raises:
        BadRow: A role is unknown, a content is no text, or a message says something beside its content.
    """
    return tuple(to_message(item, forms) for item in cell)


def to_message(item: dict[str, Any], forms: list[str]) -> Message:
    """Convert one object to a message. See `to_messages`.

    Raises:
        BadRow: See `to_messages`.
    """
    if beside := [key for key in OTHER_TEXT if item.get(key)]:
        raise BadRow(
            "text beside the content",
            f"a message has {', '.join(map(repr, beside))}; expected a role and a content. Write it into the content "
            "as the policy's chat template would, or remove it",
        )
    role, content = _cell(item, ROLE_KEYS), _cell(item, CONTENT_KEYS)
    if isinstance(content, list):
        content = _joined(content)
        forms.append(CONTENT_PARTS)
    if not isinstance(content, str):
        detail = f"a message with keys {sorted(map(str, item))} has {describe(content)} as content; expected text"
        raise BadRow("wrong type", detail)
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRow("unknown role", f"{role!r}; expected one of {', '.join(ROLES)}")
    return Message(role=known, content=content)


def unread_keys(cell: Any) -> dict[str, Any]:
    """Return the entries of messages that are neither role nor content, the last one of each key. Not null ones.

    Args:
        cell: Any cell. Only messages have such entries.
    """
    items = [cell] if isinstance(cell, dict) else cell
    if not is_messages(items):
        return {}
    read = {*ROLE_KEYS, *CONTENT_KEYS, *OTHER_TEXT}
    return {key: value for item in items for key, value in item.items() if key not in read and value is not None}


def _cell(item: dict[str, Any], keys: Sequence[str]) -> Any:
    found = {key: item[key] for key in keys if item.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise BadRow("ambiguous message", f"found different values under {' and '.join(map(repr, found))}")
    return values[0] if values else None


def _joined(parts: list[Any]) -> str:
    """Join the text parts of a content by line ends. A part is a text or `{"type": "text", "text": ...}`."""
    texts: list[str] = []
    for part in parts:
        kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, dict) else ("text", part)
        if kind != "text" or not isinstance(text, str):
            raise BadRow("wrong type", f"a content has a part of type {kind!r}; expected parts of type 'text' only")
        texts.append(text)
    return "\n".join(texts)


_BEGIN = r"\s*(?:array\(\s*)?\[?\s*\{\s*"
_BEGINS_LIKE_MESSAGES = re.compile(rf"""{_BEGIN}(['"])(?:role|from|speaker|content|value|text)\1\s*:""")
_BEGINS_LIKE_OBJECTS = re.compile(rf"""{_BEGIN}(['"])\w+\1\s*:""")
_ROLE_KEY = re.compile(r"""(['"])(?:role|from|speaker)\1\s*:""")
_KNOWN_ROLE = re.compile(rf"""{_ROLE_KEY.pattern}\s*(['"])(?:{"|".join(ROLES)})\2""", re.IGNORECASE)
_CONTENT_KEY = re.compile(r"""(['"])(?:content|value|text)\1\s*:""")
_LIST_OF_OBJECTS = re.compile(r"\s*(?:array\(\s*)?\[\s*\{.*\}\s*\](?:,\s*dtype=object\))?\s*\Z", re.DOTALL)


def spelled_messages(cell: Any, forms: list[str]) -> Any:
    """Convert a text that spells out a list of messages, or one message, in JSON or Python. Return other cells as is.

    A CSV file of such lists has them in this form, because its cells are texts.

    Args:
        cell: Any cell.
        forms: List to which the name of the form is appended if the cell was converted.

    Raises:
        BadRow: The text begins like a list of messages and cannot be parsed.
    """
    if not isinstance(cell, str) or not _BEGINS_LIKE_OBJECTS.match(cell) or not _ROLE_KEY.search(cell):
        return cell
    # An answer may be an object with other keys, such as a record of a person that has a role.
    certain = _BEGINS_LIKE_MESSAGES.match(cell) is not None
    # A list with the role and the content of a message is one, also as numpy prints it, without commas.
    printed = all((_LIST_OF_OBJECTS.match(cell), _KNOWN_ROLE.search(cell), _CONTENT_KEY.search(cell)))
    spelled = _parsed(cell, certain or printed)
    items = [spelled] if isinstance(spelled, dict) else spelled
    if not is_messages(items) or not all(_is_message(item, certain) for item in items):
        return cell
    forms.append(LIST_AS_TEXT)
    return spelled


def _is_message(item: dict[str, Any], certain: bool) -> bool:
    """Return True for an object with a role and a content. The role must be known, unless it is certain."""
    roles = [item[key] for key in ROLE_KEYS if key in item]
    known = certain or any(str(role).strip().lower() in ROLES for role in roles)
    return bool(roles) and known and any(key in item for key in CONTENT_KEYS)


def _parsed(text: str, certain: bool) -> Any:
    """Return the value that a text spells out, or None if it is none and need not be one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in a text
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    if not certain:
        return None
    raise BadRow(
        "message list as text",
        f"found a text that begins like a list of messages and is neither JSON nor Python: {text[:60]!r}. Write the "
        "data set as JSON lines or Parquet, or set data.columns.rendered=text to use it as text",
    )


def describe(cell: Any) -> str:
    """Return the type of a cell, for errors."""
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        return f"a list of {len(cell)} {type(cell[0]).__name__}" if len(cell) else "an empty list"
    return "nothing" if cell is None else type(cell).__name__
