"""Text and tables in Markdown: names, settings and errors come from files that anyone may have written."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


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


def markdown_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    escape: Callable[[str], str] = escape_markdown,
) -> str:
    """Format a Markdown table, with each column padded to one width.

    Args:
        header: Names of the columns.
        rows: Rows with one cell for each column.
        left: Number of columns, from the left, that are left-aligned. The others are right-aligned, for numbers.
        escape: Function from a cell to one line of Markdown. `str` for cells that are Markdown.

    Returns:
        The table without a final line break. In a cell, "|" is escaped.
    """
    lines = [[escape(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if index < left else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        + " |"
        for cells in (lines[0], rule, *lines[1:])
    )
