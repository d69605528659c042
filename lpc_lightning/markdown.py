"""Text in Markdown: names, settings and errors come from files that anyone may have written."""

from __future__ import annotations

import re


def escape_markdown(text: str) -> str:
    """Return a text of one line in which a reader's program finds no HTML, link or image."""
    line = " ".join(text.splitlines())
    line = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", line)  # "<0.001" is no HTML
    return line.replace("](", "]\\(")


def code_span(text: str) -> str:
    """Return a text as code, with a fence that is longer than any row of backticks in it."""
    line = " ".join(text.splitlines())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"
