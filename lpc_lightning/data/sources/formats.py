"""Rows of any known form -> `PreferenceExample`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from lpc_lightning.data.sources.rows import BadRow, Row
from lpc_lightning.types import Message, PreferenceExample


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a row. Only the two answers must exist; all columns not named here go to `meta`.

    Source, factor and annotator may be the same column: `annotator: factor` has a person for each factor.
    """

    prompt: str = "prompt"
    """The prompt: text, Human/Assistant text or messages. May be absent where the answers are whole conversations."""
    chosen: str = "chosen"
    """The preferred answer: text, one assistant message, or a whole conversation that ends in it."""
    rejected: str = "rejected"
    """The other answer, in the same forms."""
    source: str = "source"
    """Where the pair comes from. Absent: empty."""
    factor: str = "factor"
    """The preference factor that decided. Absent: empty."""
    annotator: str = "annotator"
    """Who labelled the pair. Absent: empty."""
    id: str = "id"
    """A name for the pair, unique in the data set. Absent: the place of the row."""

    def __post_init__(self) -> None:
        labels = {self.source, self.factor, self.annotator}
        names = [self.prompt, self.chosen, self.rejected, self.id, *labels]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"columns: {twice} named for more than one purpose; give each its own column")


class _Triple(NamedTuple):
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


_Recogniser = Callable[[Any, Any, Any], _Triple | None]
"""(prompt, chosen, rejected) cells -> what they say, or None where they are of another form."""

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
    """Read one row as a labelled comparison.

    Known forms: a prompt (text, "\\n\\nHuman: ...\\n\\nAssistant:" text, or messages) with two answers (text or one
    assistant message each); whole conversations (messages or Human/Assistant text) in both answers, whose shared turns
    are the prompt. Messages are `{"role", "content"}` or `{"from", "value"}`.

    Args:
        row: Column name -> cell.
        place: Where the row stands; its id where it names none.
        columns: Names of the columns.

    Raises:
        BadRow: The row cannot be used; the reason says why.
    """
    cells = [row.get(columns.prompt), row.get(columns.chosen), row.get(columns.rejected)]
    for name, cell in ((columns.chosen, cells[1]), (columns.rejected, cells[2])):
        if cell is None:
            raise BadRow("missing answer", f"no {name!r}; the row has {sorted(map(str, row))}")
    found = next((triple for recognise in _RECOGNISERS if (triple := recognise(*cells))), None)
    if found is None:
        kinds = ", ".join(
            f"{name}: {_kind(cell)}"
            for name, cell in zip((columns.prompt, columns.chosen, columns.rejected), cells, strict=True)
        )
        raise BadRow("unknown form", f"{kinds}; expected texts or lists of messages")
    example = PreferenceExample(
        id=_label(row, columns.id) or place,
        prompt=found.prompt,
        chosen=found.chosen,
        rejected=found.rejected,
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
        raise BadRow("no prompt", "neither a prompt nor a turn that both conversations share")
    last = example.prompt[-1]
    if last["role"] != "user":
        raise BadRow("prompt does not end in a user turn", f"its last turn is of {last['role']!r}")
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
                "invalid text", f"half of a surrogate pair at character {error.start} of {text[:40]!r}"
            ) from error


def _conversations(prompt: Any, chosen: Any, rejected: Any) -> _Triple | None:
    if not (_is_messages(chosen) and _is_messages(rejected)) or (prompt and len(chosen) == len(rejected) == 1):
        return None
    triple = _split_conversations(_messages(chosen), _messages(rejected))
    if _is_messages(prompt) and _messages(prompt) != triple.prompt:
        raise BadRow("prompt differs from the conversations", "the prompt's messages are not the turns they share")
    return triple


def _human_assistant(prompt: Any, chosen: Any, rejected: Any) -> _Triple | None:
    answers = (chosen, rejected)
    if not all(isinstance(text, str) and text.lstrip().startswith("Human:") for text in answers):
        return None
    # Beside a prompt, an answer may well be a dialogue; it is the conversation only where it repeats the prompt.
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
        raise BadRow("no prompt", "no prompt beside the answers, and the answers are not whole conversations")
    return None


_RECOGNISERS: tuple[_Recogniser, ...] = (
    _conversations,
    _human_assistant,
    _human_assistant_prompt,
    _prompt_and_answers,
)


def _split_conversations(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> _Triple:
    """The turns that both conversations share, and the one answer that is left of each."""
    shared = len(chosen) - 1
    if len(rejected) != len(chosen) or chosen[:shared] != rejected[:shared]:
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        where = f"turn {same + 1}" if same is not None else "their number of turns"
        found = f"{len(chosen)} and {len(rejected)} turns, which part at {where}"
        raise BadRow("conversations differ before the last turn", f"{found}; expected one answer left on each side")
    if {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        found = f"{chosen[-1]['role']!r} and {rejected[-1]['role']!r}"
        raise BadRow("conversation does not end in an answer", f"the last turns are of {found}")
    return _Triple(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _is_messages(cell: Any) -> bool:
    return isinstance(cell, Sequence) and bool(cell) and all(isinstance(item, dict) for item in cell)


def _messages(cell: Sequence[Any]) -> tuple[Message, ...]:
    return tuple(_message(item) for item in cell)


def _message(item: dict[str, Any]) -> Message:
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(content, str):
        raise BadRow(
            "wrong type", f"a message with keys {sorted(item)} has {_kind(content)} for content; expected text"
        )
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
        raise BadRow("conversation does not end in an answer", f"the only turn is of {message['role']!r}")
    return message["content"]


def _is_human_assistant(cell: Any) -> bool:
    return isinstance(cell, str) and (
        cell.startswith("\n\nHuman:") or (cell.lstrip().startswith("Human:") and "\n\nAssistant:" in cell)
    )


def _turns(text: str) -> tuple[Message, ...]:
    """Turns of a text like "\\n\\nHuman: ...\\n\\nAssistant: ...", without the space around each."""
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
