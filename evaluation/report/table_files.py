"""Tables, and their files in Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpc_lightning.files.csv_files import write_csv
from lpc_lightning.files.json_files import write_text
from lpc_lightning.files.markdown import escape_markdown, markdown_table

NO_VALUE = "-"
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    **{character: f"\\{character}" for character in "&%$#_"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "…": r"\ldots{}",
    "\n": " ",
}
"""LaTeX code of special characters."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table."""

    text: str
    key: float | str | None = None
    """Sort key: a number in a numeric column, else a text. None: no value, sorted last."""


@dataclass(frozen=True)
class Column:
    """A column's name, and whether it is numeric."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table for readers, with the same numbers for programs."""

    name: str
    """Name of its files, without suffix."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    records: Sequence[Mapping[str, Any]]
    """The lines of the CSV file, in full precision. None: no value."""
    notes: Sequence[str] = ()
    """Explanations below the table."""
    names: Sequence[str] = ()
    """First columns of the CSV file. Needed if there may be no record."""


def text_cell(value: object) -> Cell:
    """Make a cell of a text, or of a number without formatting."""
    return Cell(str(value), value if isinstance(value, int | float) else str(value))


def number_cell(value: float | None, form: str = ".4f") -> Cell:
    """Make a cell of a formatted number. None gives a dash."""
    return Cell(NO_VALUE) if value is None else Cell(format(value, form), value)


def make_record(axes: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Make a line of a CSV file. An axis with the name of another column becomes `axis.NAME`, such as `axis.n`."""
    return {f"axis.{name}" if name in numbers else name: value for name, value in axes.items()} | dict(numbers)


def to_markdown(table: Table) -> str:
    """Format a table as Markdown, with its title above and its notes below."""
    left = next((index for index, column in enumerate(table.columns) if column.numeric), len(table.columns))
    rows = [[cell.text for cell in row] for row in table.rows]
    names, notes = [column.name for column in table.columns], map(escape_markdown, table.notes)
    parts = [f"## {escape_markdown(table.title)}", markdown_table(names, rows, left), *notes]
    return "\n\n".join(parts) + "\n"


def to_latex(table: Table) -> str:
    r"""Format a table as a LaTeX `tabular` with booktabs rules. The preamble needs `\usepackage{booktabs}`."""
    alignment = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", _latex_row([column.name for column in table.columns])]
    lines += [r"\midrule", *(_latex_row([cell.text for cell in row]) for row in table.rows), r"\bottomrule"]
    notes = [f"% {note}".replace("\n", " ") for note in (table.title, *table.notes)]
    return "\n".join([*notes, *lines, r"\end{tabular}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join("".join(LATEX.get(character, character) for character in cell) for cell in cells)
    # LaTeX reads "[" and "*" after "\\" as an argument of it, so that a row must not start with them.
    return ("{}" if row.startswith(("[", "*")) else "") + row + r" \\"


def write_table(folder: Path, table: Table) -> None:
    """Write NAME.md, NAME.csv and NAME.tex into an existing folder."""
    write_text(folder / f"{table.name}.md", to_markdown(table))
    write_text(folder / f"{table.name}.tex", to_latex(table))
    write_csv(folder / f"{table.name}.csv", table.records, table.names)
