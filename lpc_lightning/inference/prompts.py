"""Prompts from the command line and from files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.prompts import INPUT, SYSTEM_NAMES
from lpc_lightning.data.sources.reading import read_rows
from lpc_lightning.data.sources.rows import BadRow, DataError, check_text
from lpc_lightning.types import Message

Prompt = tuple[Message, ...]
PARTS = ("prompt", *SYSTEM_NAMES, INPUT)
"""Columns with parts of a prompt, in training data as here."""


def text_prompt(text: str, system: str | None = None) -> Prompt:
    """Return one user turn, after a system turn if `system` is given.

    Raises:
        DataError: A text is not valid Unicode.
    """
    user = Message(role="user", content=_checked(text, "prompt"))
    return (user,) if system is None else (Message(role="system", content=_checked(system, "system")), user)


def read_prompts(path: str, system: str | None = None) -> list[Prompt]:
    """Read the prompts of a file.

    Args:
        path: `.txt`: a prompt a line, empty lines are skipped. Any other format of `read_rows` (`.jsonl`, `.json`,
            `.csv` ...): the column `prompt`, as text, messages or Human/Assistant text, and the columns of a system
            text, as in training data.
        system: Put before each prompt that has no system text of its own.

    Raises:
        DataError: The file is missing or empty, or a row has no prompt, or one that training refuses. The message names
            file and row.
    """
    prompts = list(_lines(Path(path)) if path.lower().endswith(".txt") else _rows(path))
    if not prompts:
        raise DataError(f"{path} holds no prompts. Expected one a line.")
    if system is None:
        return prompts
    turn = Message(role="system", content=_checked(system, "system"))
    return [prompt if prompt[0]["role"] == "system" else (turn, *prompt) for prompt in prompts]


def _checked(text: str, setting: str) -> str:
    try:
        check_text(text)
    except BadRow as fault:
        raise DataError(f"{setting}: {fault}. Expected text in UTF-8.") from fault
    return text


def _lines(path: Path) -> Iterator[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise DataError(f"There is no file {path}. Expected a text file with a prompt a line.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    yield from (text_prompt(line.strip()) for line in lines if line.strip())


def _rows(path: str) -> Iterator[Prompt]:
    for place, row in read_rows(path):
        if "prompt" not in row:
            raise DataError(f"{place}: found the columns {', '.join(map(str, row))}, expected `prompt`.")
        parts = {name: row[name] for name in PARTS if name in row}
        try:
            # Read as a preference row is, so that a prompt is the same here and in training; the answers do not matter.
            yield to_example({**parts, "chosen": "a", "rejected": "b"}, place).prompt
        except BadRow as fault:
            raise DataError(
                f"{place}: {fault}. A file of prompts has no data.columns: expected the whole prompt in `prompt`, as "
                "text or as messages that end in a user turn, and a system text there or in `system`."
            ) from fault
