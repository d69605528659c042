"""Tables as text: Markdown that can be read in a terminal as it is."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table with its columns padded to one width.

    Args:
        header: Names of the columns.
        rows: Cells, as many in each row as there are columns.
        left: Columns from the left that are aligned to the left; the others are numbers, aligned to the right.

    Returns:
        The table without a line break at its end. A "|" in a cell is escaped, so that it ends no cell.
    """
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if place < left else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        + " |"
        for cells in (lines[0], rule, *lines[1:])
    )


def score(value: float, stderr: float | None = None) -> str:
    """`0.4321 ± 0.0123`: a score and, where it is known, its standard error."""
    return f"{value:.4f}" if stderr is None else f"{value:.4f} ± {stderr:.4f}"


def p_value(value: float) -> str:
    """`0.031`, or `<0.001`."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
