"""A table, and its forms on disk: Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpc_lightning.evaluation.tables import markdown_table

NOTHING = "-"
LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    **{each: f"\\{each}" for each in "&%$#_"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "…": r"\ldots{}",
    "\n": " ",
}


@dataclass(frozen=True)
class Cell:
    """What stands in a table's cell."""

    text: str
    key: float | str | None = None
    """What a reader sorts by: a number in columns of numbers, else its text. None: nothing is known, which comes last.
    """


@dataclass(frozen=True)
class Column:
    """A column's name, and whether it holds numbers."""

    name: str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table for readers, and the numbers in it for programs."""

    name: str
    """Of its files."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    records: Sequence[Mapping[str, Any]]
    """The same, one flat entry a line of the CSV file, in full precision. What is not known is None."""
    notes: Sequence[str] = ()
    """How to read it."""


def text_cell(value: object) -> Cell:
    """Text, or a number as it is."""
    return Cell(str(value), value if isinstance(value, int | float) else str(value))


def number_cell(value: float | None, form: str = ".4f") -> Cell:
    """A number in a form; a dash where there is none."""
    return Cell(NOTHING) if value is None else Cell(format(value, form), value)


def to_markdown(table: Table) -> str:
    """The table with its title above and its notes below."""
    left = next((place for place, column in enumerate(table.columns) if column.numeric), len(table.columns))
    rows = [[cell.text for cell in row] for row in table.rows]
    parts = [f"## {table.title}", markdown_table([column.name for column in table.columns], rows, left), *table.notes]
    return "\n\n".join(parts) + "\n"


def to_latex(table: Table) -> str:
    r"""A `tabular` with booktabs' rules; the preamble needs `\usepackage{booktabs}`."""
    places = "".join("r" if column.numeric else "l" for column in table.columns)
    lines = [rf"\begin{{tabular}}{{{places}}}", r"\toprule", _line([column.name for column in table.columns])]
    lines += [r"\midrule", *(_line([cell.text for cell in row]) for row in table.rows), r"\bottomrule"]
    notes = [f"% {note}".replace("\n", " ") for note in (table.title, *table.notes)]
    return "\n".join([*notes, *lines, r"\end{tabular}"]) + "\n"


def _line(cells: Sequence[str]) -> str:
    line = " & ".join("".join(LATEX.get(letter, letter) for letter in cell) for cell in cells)
    # Behind the line before, these would be an argument of its "\\".
    return ("{}" if line.startswith(("[", "*")) else "") + line + r" \\"


def write_table(folder: Path, table: Table) -> None:
    """Write NAME.md, NAME.csv and NAME.tex into a folder that is there."""
    (folder / f"{table.name}.md").write_text(to_markdown(table), encoding="utf-8")
    (folder / f"{table.name}.tex").write_text(to_latex(table), encoding="utf-8")
    write_csv(folder / f"{table.name}.csv", table.records)


def write_csv(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Flat entries, with every name that any of them has; numbers to the last digit, and nothing for None."""
    names = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(records)
