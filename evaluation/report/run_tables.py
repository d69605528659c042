"""Tables of single runs that are no numbers: what the codes stand for, and answers to prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lpc_lightning.evaluation.codebook.explanation_files import explanation_tables, read_explanation
from lpc_lightning.evaluation.figures import shorten
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.table_files import Column, Table, text_cell
from lpc_lightning.evaluation.samples import TOP, read_samples, samples_table
from lpc_lightning.inference.generation import likeliest_codes

LONGEST_TITLE = 120
"""Characters of a prompt in a title at most. The whole prompt is in a note below."""


@dataclass(frozen=True)
class RunTables:
    """The tables of one run."""

    run: str
    tables: tuple[Table, ...]


def run_tables(records: Iterable[RunRecord]) -> list[RunTables]:
    """Read the tables of the runs that have some."""
    found = ((record.name, tuple(_tables(record.folder))) for record in records if record.folder is not None)
    return [RunTables(name, tables) for name, tables in found if tables]


def _tables(folder: Path) -> Iterator[Table]:
    yield from _codes(folder)
    yield from _samples(folder)


def _codes(folder: Path) -> Iterator[Table]:
    content = read_explanation(folder)
    for number, table in enumerate(() if content is None else explanation_tables(content)):
        cells = [[text_cell(text) for text in row] for row in table.rows]
        yield Table(f"codes_{number}", table.title, [Column(name) for name in table.header], cells, [], table.notes)


def _samples(folder: Path) -> Iterator[Table]:
    """Yield a table for each prompt, with the answers of the last validation."""
    records = read_samples(folder)
    for number, record in enumerate(record for record in records if record["step"] == records[-1]["step"]):
        header, rows = samples_table(record)
        prompt = record["prompt"][-1]["content"]
        title = f"Step {record['step']}: {shorten(' '.join(prompt.split()), LONGEST_TITLE)}"
        notes = [f"The prompt: {prompt}"] if len(prompt) > LONGEST_TITLE else []
        if record["prior"] is not None:
            notes.append(likeliest_codes(record["prior"], TOP))
        cells = [[text_cell(text) for text in row] for row in rows]
        yield Table(f"samples_{number}", title, [Column(name) for name in header], cells, [], notes)
