"""Structures of a pair: whole conversations, or a prompt with two answers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

from lpc_lightning.data.sources.markup import occurs, read_headed, read_markup
from lpc_lightning.data.sources.messages import describe, is_messages, to_message, to_messages
from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.types import Message


class Triple(NamedTuple):
    """Texts of a pair."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


Structure: TypeAlias = Callable[[Any, Any, Any, list[str]], Triple | None]
"""Function from the cells of prompt, chosen and rejected to a triple. It returns None if the cells have another
structure. It appends the names of special forms to the list."""


def conversations(prompt: Any, chosen: Any, rejected: Any, forms: list[str]) -> Triple | None:
    """Read two lists of messages. Their common turns are the prompt, which the prompt's cell may repeat.

    Raises:
        BadRow: The conversations are no pair, or the prompt's cell has something else.
    """
    if not (is_messages(chosen) and is_messages(rejected)) or len(chosen) == len(rejected) == 1:
        return None
    triple = _split(to_messages(chosen, forms), to_messages(rejected, forms))
    _require_repeated(prompt, triple.prompt, forms)
    return triple


def rendered_conversations(prompt: Any, chosen: Any, rejected: Any, forms: list[str]) -> Triple | None:
    """Read two rendered dialogues. Their common turns are the prompt, which the prompt's cell may repeat.

    Raises:
        BadRow: The dialogues are no pair, or the prompt's cell has something else.
    """
    one, other = read_markup(chosen), read_markup(rejected)
    if one is None or other is None or len(one[1]) == len(other[1]) == 1:
        return None
    # With a prompt, an answer may itself be a dialogue in lines. It is a whole conversation only if it repeats the
    # prompt. Control tokens are no answer.
    begins = isinstance(prompt, str) and all(_words(text).startswith(_words(prompt)) for text in (chosen, rejected))
    if prompt and not begins and not one[0].has_tokens and not _repeats_last_turn(prompt, _common(one[1], other[1])):
        return None
    forms.append(one[0].description)
    triple = _split(one[1], other[1])
    if not begins:
        _require_repeated(prompt, triple.prompt, forms)
    return triple


def rendered_prompt(prompt: Any, chosen: Any, rejected: Any, forms: list[str]) -> Triple | None:
    """Read a rendered dialogue that ends where the answers begin."""
    rendered = read_markup(prompt) or read_headed(prompt, chosen, rejected)
    if rendered is None:
        return None
    markup, turns = rendered
    if turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip():
        turns = turns[:-1]
    forms.append(markup.description)
    return Triple(turns, *(markup.answer(_answer(cell, forms)) for cell in (chosen, rejected)))


def prompt_and_answers(prompt: Any, chosen: Any, rejected: Any, forms: list[str]) -> Triple | None:
    """Read a prompt, as text or messages, and two answers, each as text or one assistant message."""
    if is_messages(prompt):
        return Triple(to_messages(prompt, forms), _answer(chosen, forms), _answer(rejected, forms))
    if isinstance(prompt, str):
        return Triple((Message(role="user", content=prompt),), _answer(chosen, forms), _answer(rejected, forms))
    return None


def _split(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Triple:
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
    return Triple(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _common(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the first turns that two conversations share, without their last turns."""
    both = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
    return tuple(turn for turn, _ in both)


def _repeats_last_turn(prompt: Any, common: tuple[Message, ...]) -> bool:
    """Return True if the last turn of a prompt occurs in common turns.

    Args:
        prompt: A text, a rendered text or messages. Of a rendered text, an open answer is no turn.
        common: Common turns of two conversations.
    """
    if is_messages(prompt):
        return occurs(to_messages(prompt, [])[-1]["content"], common)
    rendered = read_markup(prompt)
    turns = [prompt] if rendered is None else [turn["content"] for turn in rendered[1] if turn["content"].strip()]
    return bool(turns) and isinstance(turns[-1], str) and occurs(turns[-1], common)


def _require_repeated(prompt: Any, common: tuple[Message, ...], forms: list[str]) -> None:
    """Refuse a prompt's cell that the common turns do not repeat: what only the cell has would be in no text.

    Args:
        prompt: The cell. Messages must be the common turns, apart from white space around them. A text must occur in
            their contents.
        common: Common turns of two conversations.
        forms: See `to_messages`.
    """
    if is_messages(prompt):
        repeated = _stripped(to_messages(prompt, forms)) == _stripped(common)
        found = "the prompt's messages are not their common turns"
    else:
        repeated = not prompt or (isinstance(prompt, str) and occurs(prompt, common))
        found = f"the prompt {str(prompt)[:40]!r} does not occur in their common turns"
    if not repeated:
        raise BadRow(
            "prompt differs from the conversations",
            f"{found}. Correct it, or set data.columns.prompt to a name that no row has to use the conversations alone",
        )


def _stripped(turns: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def _words(text: str) -> str:
    return " ".join(text.split())


def _answer(cell: Any, forms: list[str]) -> str:
    if isinstance(cell, str):
        return cell
    items = [cell] if isinstance(cell, dict) else cell
    if not is_messages(items) or len(items) != 1:
        raise BadRow("wrong type", f"an answer is {describe(cell)}; expected text or one assistant message")
    message = to_message(items[0], forms)
    if message["role"] != "assistant":
        raise BadRow("conversation does not end in an answer", f"the only turn has the role {message['role']!r}")
    return message["content"]
