"""Text of a tokenized pair, with marks around the part that is trained."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lpc_lightning.types import TokenizedPair

RENDERED_PAIR = "rendered_pair.txt"
"""File of a run folder with the printed pair."""
START, END = ">>>", "<<<"
"""Marks around the trained tokens."""
SHOWN_TOKENS = 3
"""Number of tokens that are listed on each side of a boundary."""


def render_pair(pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the prompt and both answers as decoded text. The loss reads the tokens between the marks, and no others.

    Line breaks and control characters are escaped, so that each part is one line and no terminal interprets them. The
    tokens at each boundary are listed one by one.

    Args:
        pair: The pair. Its label is that of the run, including label noise.
        tokenizer: Tokenizer of the policy.
    """

    def text(ids: Sequence[int]) -> str:
        return escape_text(str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))

    def tokens(ids: Sequence[int]) -> str:
        return " ".join(f"[{text([token])}]" for token in ids)

    def ends(ids: Sequence[int]) -> str:
        if len(ids) <= 2 * SHOWN_TOKENS:
            return tokens(ids)
        return f"{tokens(ids[:SHOWN_TOKENS])} ... {tokens(ids[-SHOWN_TOKENS:])}"

    lines = [
        f"pair {escape_text(pair.id)} as tokens. The loss reads the tokens between {START} and {END} only.",
        f"  prompt, {len(pair.prompt_ids)} tokens, not trained: {text(pair.prompt_ids)}",
    ]
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        lines += [
            f"  {name}, {len(ids)} tokens, trained: {START}{text(ids)}{END}",
            f"    tokens: ... {tokens(pair.prompt_ids[-SHOWN_TOKENS:])} {START} {ends(ids)} {END}",
        ]
    if pair.flipped:
        lines.append("  the label is known to be wrong: a gold label or label noise says so")
    return "\n".join(lines)


def escape_text(text: str) -> str:
    r"""Escape the characters that a terminal could interpret: line breaks, control and format characters.

    A backslash is escaped as well, so that the text can be restored.

    Example:
        >>> print(escape_text("egg\n\x1b[31m"))
        egg\n\x1b[31m
    """
    return "".join(_escape(character) for character in text)


def _escape(character: str) -> str:
    if character == "\\" or (unicodedata.category(character)[0] in "CZ" and character != " "):
        return character.encode("unicode_escape").decode("ascii")
    return character
