"""Parts of a prompt that are in columns of their own: its text, a system text and an input."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import replace
from typing import Any

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.markup import occurs
from lpc_lightning.data.sources.messages import describe
from lpc_lightning.data.sources.rows import BadRow, Row, is_missing
from lpc_lightning.types import Message, PreferenceExample

PROMPT_NAMES = ("instruction", "question", "query", "history", "context")
"""Columns that hold the prompt in known data sets."""
SYSTEM_NAMES = ("system", "system_prompt", "system_message")
"""Columns that hold a system text in known data sets."""
INPUT = "input"


def find_prompt(row: Row, columns: Columns, of_form: str | None) -> str:
    """Return the column of the prompt.

    Args:
        row: Cells by column name.
        columns: Names of the columns.
        of_form: Column of the prompt in the data set that the row's answers belong to, if known.

    Raises:
        BadRow: Several columns may hold the prompt.
    """
    if not is_missing(row.get(columns.prompt)) or columns.prompt != Columns.prompt:
        return columns.prompt
    free = [name for name in PROMPT_NAMES if not _is_empty(row.get(name)) and name not in columns.purposes]
    if of_form in free:
        return of_form
    if len(free) > 1:
        raise BadRow("ambiguous columns", f"found no {columns.prompt!r}, but {_names(free)}; set data.columns.prompt")
    return free[0] if free else columns.prompt


def refuse_other_prompt(row: Row, columns: Columns, turns: tuple[Message, ...]) -> None:
    """Refuse a row whose answers are dialogues in lines, with a text in a column of a prompt that is in no turn.

    The answers may be whole conversations, or answers to that prompt.

    Raises:
        BadRow: There is such a text.
    """
    if row.get(columns.prompt) or columns.prompt != Columns.prompt:
        return
    texts = {name: row.get(name) for name in PROMPT_NAMES if name not in columns.purposes}
    for name, text in texts.items():
        if isinstance(text, str) and text.strip() and not occurs(text, turns):
            raise BadRow(
                "ambiguous columns",
                f"found dialogues as answers, and text in {name!r} that is in no turn of them. Set data.columns.prompt="
                f"{name} if the dialogues are answers to it, or to a name that no row has if they are whole "
                "conversations",
            )


def with_name(example: PreferenceExample, label: str | None) -> PreferenceExample:
    """Write a label of the example, such as `annotator`, into the first line of the last user turn.

    Without a label, or if it is empty, return the example unchanged.
    """
    name = "" if label is None else getattr(example, label)
    if label is None or not name:
        return example
    *before, last = example.prompt
    named = Message(role=last["role"], content=f"{label.capitalize()}: {name}\n{last['content']}")
    return replace(example, prompt=(*before, named), question=example.prompt)


def with_system(prompt: tuple[Message, ...], row: Row, columns: Columns) -> tuple[tuple[Message, ...], list[str]]:
    """Place the system text of a column before the prompt. Return the prompt, and the columns that were used.

    Raises:
        BadRow: Several columns have a system text, or the prompt has another one. Or a column has something else than
            text.
    """
    named = None if columns.system is None else [columns.system]
    names = _texts(row, "system", SYSTEM_NAMES, columns) if named is None else _texts(row, "system", named)
    if not names:
        return prompt, []
    texts = {row[name] for name in names} | {turn["content"] for turn in prompt if turn["role"] == "system"}
    if len(texts) > 1:
        others = " and in the prompt" if len({row[name] for name in names}) == 1 else ""
        raise BadRow(
            "ambiguous columns", f"found different system texts in {_names(names)}{others}; set data.columns.system"
        )
    if prompt and prompt[0]["role"] == "system":
        return prompt, names
    return (Message(role="system", content=texts.pop()), *prompt), names


def with_input(
    prompt: tuple[Message, ...], name: str, row: Row, columns: Columns
) -> tuple[tuple[Message, ...], list[str]]:
    """Append the text of the input column to the prompt's last turn. Return the prompt, and the columns that were used.

    A turn that is the input, or ends with it after a blank line, is not changed.

    Args:
        prompt: The prompt so far.
        name: Column of the prompt.
        row: Cells by column name.
        columns: Names of the columns.

    Raises:
        BadRow: The row has a column `input`, the prompt is not in `instruction`, and no setting names the input column.
            Or the column has something else than text.
    """
    named = None if columns.input is None else [columns.input]
    found = _texts(row, "input", [INPUT], columns) if named is None else _texts(row, "input", named)
    if not found or not prompt or _ends_with(prompt[-1]["content"].strip(), row[found[0]].strip()):
        return prompt, []
    if columns.input is None and name != "instruction":
        raise BadRow(
            "ambiguous columns",
            f"found text in {name!r} and in {INPUT!r}. Set data.columns.input={INPUT} to append it to the prompt, or "
            "to a name that no row has to leave it out",
        )
    *earlier, last = prompt
    text = f"{last['content']}\n\n{row[found[0]]}"
    return (*earlier, Message(role=last["role"], content=text)), found


def _ends_with(text: str, part: str) -> bool:
    # An input such as "4" may occur in the middle of an instruction by chance.
    return text == part or text.endswith(f"\n\n{part}")


def _texts(row: Row, setting: str, names: Sequence[str], columns: Columns | None = None) -> list[str]:
    """Return the columns that have a text and no other purpose.

    Raises:
        BadRow: One of them has something else than text, which would be in no prompt.
    """
    taken = set() if columns is None else columns.purposes
    filled = [name for name in names if name not in taken and not _is_empty(row.get(name))]
    for name in filled:
        if not isinstance(row[name], str):
            raise BadRow(
                "wrong type",
                f"found {describe(row[name])} in {name!r}, expected text. Write it as text, or set "
                f"data.columns.{setting} to a name that no row has to leave it out",
            )
    return filled


def _is_empty(cell: Any) -> bool:
    """Return True for a cell without content."""
    if isinstance(cell, str):
        return not cell.strip()
    return is_missing(cell) or (isinstance(cell, Sized) and not cell)


def _names(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))
