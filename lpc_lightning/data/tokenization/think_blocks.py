"""Think blocks: the reasoning that some chat templates put in front of an answer.

A template may open a block in the generation prompt (DeepSeek-R1), put an empty block in front of an answer without
one (Qwen3), or close it in the generation prompt (Qwen3 with `enable_thinking: false`). The tokenized sequence has
exactly one block in each case.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lpc_lightning.data.sources.rows import BadRow

CLOSED = "think block of the generation prompt closed in front of an answer without one"

_NAME = r"(?P<name>\w*(?:think|thought|reason)\w*)"
_OPEN = re.compile(rf"(?P<left>[<\[]){_NAME}(?P<right>[>\]])", re.IGNORECASE)
_OPEN_AT_END = re.compile(rf"{_OPEN.pattern}(?P<space>\s*)\Z", re.IGNORECASE)
_DOUBLED = re.compile(rf"(?P<tag>{_OPEN.pattern})\s*((?P=left)/(?P=name)(?P=right)\s*)?(?P=tag)", re.IGNORECASE)
_TAG = re.compile(rf"[<\[]/?{_NAME}[>\]]", re.IGNORECASE)
_WINDOW = 200
"""Number of characters at the end of a prompt that are searched for a block."""


def is_think_tag(text: str) -> bool:
    """Return True for a tag such as <think>, </think> or [THINK]. Answers may contain these tokens."""
    return _TAG.fullmatch(text) is not None


def continue_block(prompt: str, answer: str, note: Callable[[str], None]) -> str:
    """Return the text of an answer behind a prompt that may end in an open think block.

    Without an open block, this is the answer. A block that the answer opens itself continues the block of the prompt.
    If the answer has no block, the block of the prompt is closed first.

    Args:
        prompt: The rendered prompt.
        answer: The answer.
        note: Called with a description if a block is closed.
    """
    opened = _OPEN_AT_END.search(prompt[-_WINDOW:])
    if opened is None:
        return answer
    tag = opened["left"] + opened["name"] + opened["right"]
    closing = f"{opened['left']}/{opened['name']}{opened['right']}"
    own = answer.lstrip()
    if own.startswith(tag):
        return own.removeprefix(tag).removeprefix(opened["space"])
    if closing in answer:
        return answer
    note(CLOSED)
    return f"\n{closing}\n\n{own}"


def check_one_block(prompt: str, completion: str, answer: str) -> None:
    """Check that an answer's think block does not stand behind another one.

    Raises:
        BadRow: The template opens a block in front of the answer, which has a block of its own.
    """
    if found := _DOUBLED.search(prompt[-_WINDOW:] + completion):
        raise BadRow(
            "two think blocks",
            f"the answer {answer[:40]!r} begins with {found['tag']}, and the chat template puts a block in front of "
            "it; expected one block. Close or remove the block of the answer, or have the template leave its own out "
            "(such as data.template_kwargs.enable_thinking: true)",
        )
