"""Markdown tables that are readable as plain text in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from lpc_lightning.markdown import escape_markdown


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format a Markdown table, with each column padded to one width.

    Args:
        header: Names of the columns.
        rows: Rows with one cell for each column.
        left: Number of columns, from the left, that are left-aligned. The others are right-aligned, for numbers.

    Returns:
        The table without a final line break. In a cell, "|" and HTML are escaped, and a line break becomes a space.
    """
    lines = [[escape_markdown(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
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


def score(value: float, stderr: float | None = None) -> str:
    """Format a score and its standard error, if known: `0.4321 ± 0.0123`."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def p_value(value: float) -> str:
    """Format a p-value: `0.031` or `<0.001`."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
