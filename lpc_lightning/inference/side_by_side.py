"""Format texts in columns that fit the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import zip_longest

NARROWEST = 24
"""Minimum width of a column, in characters. Below it, texts are stacked."""


def side_by_side(texts: Mapping[str, str], width: int) -> str:
    """Format texts in columns under their titles, each wrapped to an equal part of `width` characters.

    Line breaks are kept. Texts are stacked if a column would be narrower than `NARROWEST`.
    """
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if len(texts) > 1 and column < NARROWEST:
        return "\n\n".join(side_by_side({title: text}, width) for title, text in texts.items())
    columns = [[*textwrap.wrap(title, column), "-" * column, *_wrapped(text, column)] for title, text in texts.items()]
    lines = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(part.ljust(column) for part in line).rstrip() for line in lines)


def _wrapped(text: str, width: int) -> list[str]:
    lines = (textwrap.wrap(line, width, replace_whitespace=False) or [""] for line in text.splitlines())
    return [part for wrapped in lines for part in wrapped]
