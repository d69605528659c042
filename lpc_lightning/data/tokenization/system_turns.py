"""Treatment of system turns that a template cannot render."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.types import Message

SystemTurns = Literal["auto", "keep", "fold", "drop"]
"""Treatment of system turns. `auto`: `keep` if the template renders them, otherwise `fold`."""

FOLDED = "system turn put in front of the next user turn"
DROPPED = "system turn left out"

Conversation = tuple[Message, ...]


def treat_system_turns(prompt: Sequence[Message], treatment: SystemTurns) -> tuple[Conversation, str]:
    """Return the prompt as the template gets it, and a description of the change. It is empty if nothing changed."""
    change, description = _TREATMENTS[treatment]
    changed = change(tuple(prompt))
    return changed, description if changed != tuple(prompt) else ""


def check_treatment(treatment: str) -> None:
    """Check the setting.

    Raises:
        DataError: The setting has no such value.
    """
    if treatment != "auto" and treatment not in _TREATMENTS:
        raise DataError(f"data.system_turns: found {treatment!r}, expected auto, {', '.join(_TREATMENTS)}.")


def _keep(prompt: Conversation) -> Conversation:
    return prompt


def _fold(prompt: Conversation) -> Conversation:
    """Put the text of each system turn, and an empty line, in front of the next user turn."""
    turns: list[Message] = []
    waiting: list[Message] = []
    for turn in prompt:
        if turn["role"] == "system":
            waiting.append(turn)
            continue
        if turn["role"] == "user" and waiting:
            turn = Message(role="user", content="\n\n".join(each["content"] for each in (*waiting, turn)))
            waiting = []
        turns.append(turn)
    return (*turns, *waiting)


def _drop(prompt: Conversation) -> Conversation:
    return tuple(turn for turn in prompt if turn["role"] != "system")


_TREATMENTS: dict[str, tuple[Callable[[Conversation], Conversation], str]] = {
    "keep": (_keep, ""),
    "fold": (_fold, FOLDED),
    "drop": (_drop, DROPPED),
}
