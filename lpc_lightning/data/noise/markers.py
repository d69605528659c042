"""Markers in the prompts of pairs with flipped labels."""

from __future__ import annotations

from collections.abc import Callable

from lpc_lightning.types import Message

Prompt = tuple[Message, ...]


def _at_start(prompt: Prompt, marker: str) -> Prompt:
    *before, last = prompt
    return (*before, Message(role=last["role"], content=f"{marker} {last['content']}"))


def _at_end(prompt: Prompt, marker: str) -> Prompt:
    *before, last = prompt
    return (*before, Message(role=last["role"], content=f"{last['content']} {marker}"))


def _in_system(prompt: Prompt, marker: str) -> Prompt:
    first, *others = prompt
    if first["role"] != "system":
        return (Message(role="system", content=marker), *prompt)
    return (Message(role="system", content=f"{marker} {first['content']}"), *others)


MARK: dict[str, Callable[[Prompt, str], Prompt]] = {"start": _at_start, "end": _at_end, "system": _in_system}
"""Functions that add a marker to a prompt, by `marker_at`. A prompt ends with a user turn."""
