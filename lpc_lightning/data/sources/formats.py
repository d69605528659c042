"""Conversion of rows in any supported format to `PreferenceExample`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from lpc_lightning.data.sources.rows import BadRow, Row
from lpc_lightning.types import Message, PreferenceExample


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a row. Only the two answer columns are required. Other columns are stored in `meta`.

    Source, factor and annotator may be the same column. For example, `annotator: factor` treats each factor as one
    annotator.
    """

    prompt: str = "prompt"
    """The prompt: text, Human/Assistant text or messages. May be absent if the answers are whole conversations."""
    chosen: str = "chosen"
    """The preferred answer: text, one assistant message, or a whole conversation that ends with the answer."""
    rejected: str = "rejected"
    """The other answer, in the same formats."""
    source: str = "source"
    """Origin of the pair. Defaults to the empty text if absent."""
    factor: str = "factor"
    """The preference factor that decided the label. Defaults to the empty text if absent."""
    annotator: str = "annotator"
    """Name of the annotator who labelled the pair. Defaults to the empty text if absent."""
    id: str = "id"
    """Name of the pair, unique in the data set. Defaults to the place of the row if absent."""

    def __post_init__(self) -> None:
        labels = {self.source, self.factor, self.annotator}
        names = [self.prompt, self.chosen, self.rejected, self.id, *labels]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns: found {repeated} for more than one purpose, expected a column for each purpose")


class _Triple(NamedTuple):
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


_Parser = Callable[[Any, Any, Any], _Triple | None]
"""Function from the (prompt, chosen, rejected) cells to their texts. It returns None for cells in another format."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def to_example(row: Row, place: str, columns: Columns = Columns()) -> PreferenceExample:
    """Convert one row to a labelled comparison.

    Two formats are supported. The first is a prompt (text, "\\n\\nHuman: ...\\n\\nAssistant:" text, or messages)
    with two answers (text or one assistant message each). The second is whole conversations (messages or
    Human/Assistant text) in both answer columns; their common turns are the prompt. Messages are `{"role", "content"}`
    or `{"from", "value"}`.

    Args:
        row: Cells by column name.
        place: Place of the row in its file. It becomes the id if the row has none.
        columns: Names of the columns.

    Raises:
        BadRow: The row cannot be used. The exception has the reason.
    """
    cells = [row.get(columns.prompt), row.get(columns.chosen), row.get(columns.rejected)]
    for name, cell in ((columns.chosen, cells[1]), (columns.rejected, cells[2])):
        if cell is None:
            raise BadRow("missing answer", f"no {name!r}; the row has {sorted(map(str, row))}")
    triple = next((result for parse in _PARSERS if (result := parse(*cells))), None)
    if triple is None:
        kinds = ", ".join(
            f"{name}: {_kind(cell)}"
            for name, cell in zip((columns.prompt, columns.chosen, columns.rejected), cells, strict=True)
        )
        raise BadRow("unknown form", f"{kinds}; expected texts or lists of messages")
    example = PreferenceExample(
        id=_label(row, columns.id) or place,
        prompt=triple.prompt,
        chosen=triple.chosen,
        rejected=triple.rejected,
        source=_label(row, columns.source),
        factor=_label(row, columns.factor),
        annotator=_label(row, columns.annotator),
        meta={name: cell for name, cell in row.items() if name not in {getattr(columns, f.name) for f in _FIELDS}},
    )
    _check(example)
    return example


_FIELDS = fields(Columns)


def _check(example: PreferenceExample) -> None:
    if not example.prompt:
        raise BadRow("no prompt", "found no prompt column and no common turn of the two conversations")
    last = example.prompt[-1]
    if last["role"] != "user":
        raise BadRow("prompt does not end in a user turn", f"its last turn has the role {last['role']!r}")
    if not last["content"].strip():
        raise BadRow("empty prompt", f"its last user turn is {last['content']!r}")
    for name, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
        if not answer.strip():
            raise BadRow("empty answer", f"the {name} answer is {answer!r}")
    if example.chosen == example.rejected:
        raise BadRow("equal answers", f"both are {example.chosen[:40]!r}")
    labels = (example.id, example.source, example.factor, example.annotator)
    for text in (example.chosen, example.rejected, *labels, *(turn["content"] for turn in example.prompt)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRow(
                "invalid text", f"found half of a surrogate pair at character {error.start} of {text[:40]!r}"
            ) from error


def _conversations(prompt: Any, chosen: Any, rejected: Any) -> _Triple | None:
    if not (_is_messages(chosen) and _is_messages(rejected)) or (prompt and len(chosen) == len(rejected) == 1):
        return None
    triple = _split_conversations(_messages(chosen), _messages(rejected))
    if _is_messages(prompt) and _messages(prompt) != triple.prompt:
        raise BadRow("prompt differs from the conversations", "the prompt's messages are not their common turns")
    return triple


def _human_assistant(prompt: Any, chosen: Any, rejected: Any) -> _Triple | None:
    answers = (chosen, rejected)
    if not all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in answers):
        return None
    # With a prompt column, an answer may itself be a dialogue. It is a whole conversation only if it repeats the
    # prompt.
    if prompt and not (isinstance(prompt, str) and all(text.startswith(prompt.rstrip()) for text in answers)):
        return None
    return _split_conversations(_turns(chosen), _turns(rejected))


def _human_assistant_prompt(prompt: Any, chosen: Any, rejected: Any) -> _Triple | None:
    if not _is_human_assistant(prompt):
        return None
    turns = _turns(prompt)
    if turns[-1] == Message(role="assistant", content=""):
        turns = turns[:-1]
    return _Triple(turns, _answer(chosen).strip(), _answer(rejected).strip())


def _prompt_and_answers(prompt: Any, chosen: Any, rejected: Any) -> _Triple | None:
    if _is_messages(prompt):
        return _Triple(_messages(prompt), _answer(chosen), _answer(rejected))
    if isinstance(prompt, str):
        return _Triple((Message(role="user", content=prompt),), _answer(chosen), _answer(rejected))
    if prompt is None or prompt == []:
        raise BadRow("no prompt", "found no prompt, and the answers are not whole conversations")
    return None


_PARSERS: tuple[_Parser, ...] = (
    _conversations,
    _human_assistant,
    _human_assistant_prompt,
    _prompt_and_answers,
)


def _split_conversations(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> _Triple:
    """Split two conversations into their common turns and the last turn of each."""
    common = len(chosen) - 1
    if len(rejected) != len(chosen) or chosen[:common] != rejected[:common]:
        turn = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        difference = f"turn {turn + 1}" if turn is not None else "their number of turns"
        raise BadRow(
            "conversations differ before the last turn",
            f"found {len(chosen)} and {len(rejected)} turns, which differ at {difference}; expected a difference in "
            "the last turn only",
        )
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        roles = f"{chosen[-1]['role']!r} and {rejected[-1]['role']!r}"
        raise BadRow("conversation does not end in an answer", f"the last turns have the roles {roles}")
    return _Triple(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _is_messages(cell: Any) -> bool:
    return isinstance(cell, Sequence) and bool(cell) and all(isinstance(item, dict) for item in cell)


def _messages(cell: Sequence[Any]) -> tuple[Message, ...]:
    return tuple(_message(item) for item in cell)


def _message(item: dict[str, Any]) -> Message:
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(content, str):
        raise BadRow("wrong type", f"a message with keys {sorted(item)} has {_kind(content)} as content; expected text")
    if not isinstance(role, str) or role not in _ROLES:
        raise BadRow("unknown role", f"{role!r}; expected one of {', '.join(_ROLES)}")
    return Message(role=_ROLES[role], content=content)


def _answer(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    items = [cell] if isinstance(cell, dict) else cell
    if not _is_messages(items) or len(items) != 1:
        raise BadRow("wrong type", f"an answer is {_kind(cell)}; expected text or one assistant message")
    message = _message(items[0])
    if message["role"] != "assistant":
        raise BadRow("conversation does not end in an answer", f"the only turn has the role {message['role']!r}")
    return message["content"]


def _is_human_assistant(cell: Any) -> bool:
    return isinstance(cell, str) and (
        cell.startswith("\n\nHuman:") or (cell.lstrip().startswith("Human:") and "\n\nAssistant:" in cell)
    )


def _turns(text: str) -> tuple[Message, ...]:
    """Split a text like "\\n\\nHuman: ...\\n\\nAssistant: ..." into turns, without the white space around each."""
    _, *parts = _HH_TURN.split(text)
    return tuple(
        Message(role=_ROLES[name.lower()], content=content.strip())
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    )


def _label(row: Row, column: str) -> str:
    value = row.get(column)
    return "" if value is None else str(value)


def _kind(cell: Any) -> str:
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        return f"a list of {len(cell)} {type(cell[0]).__name__}" if len(cell) else "an empty list"
    return "nothing" if cell is None else type(cell).__name__
