"""Answers to fixed prompts during training: their records, and the files of a run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from lpc_lightning.files.json_files import write_text
from lpc_lightning.files.markdown import escape_markdown, markdown_table
from lpc_lightning.inference.generation import likeliest_codes, marked

ROWS, TEXT = "samples.jsonl", "samples.md"
"""Names of the files: for programs, and for readers."""
TOP = 3
"""Number of the prior's codes in the text."""

Record = dict[str, Any]
"""A prompt at one validation, as JSON: `step`, `prompt` (messages), `prior` ((K,) or null), and `answers`, a list of
`under`, `decoding`, `text`, `tokens` and `finished`."""


def write_samples(folder: Path, records: Sequence[Record]) -> None:
    """Write `samples.jsonl`, a line for each record, and `samples.md`, the latest step first.

    Args:
        folder: Run folder. It is created if it does not exist.
        records: All records of the run, by rising step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    steps = [samples_text(list(group)) for _, group in groupby(records, key=itemgetter("step"))]
    texts = {ROWS: rows, TEXT: "\n".join(["# Samples\n", *reversed(steps)])}
    for name, text in texts.items():
        write_text(folder / name, text)


def read_samples(folder: Path) -> list[Record]:
    """Read the records of a run folder. Empty if there are none."""
    path = folder / ROWS
    if not path.is_file():
        return []
    # Texts hold U+2028 and the like, at which `splitlines` would cut a row.
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def samples_text(records: Sequence[Record]) -> str:
    """Format the records of one step as Markdown: for each prompt, the answers side by side."""
    parts = [f"## Step {records[0]['step']}"]
    for number, record in enumerate(records, 1):
        parts.append(f"### Prompt {number}\n\n{_quoted(record['prompt'][-1]['content'])}")
        if record["prior"] is not None:
            parts.append(likeliest_codes(record["prior"], TOP))
        header, rows = samples_table(record)
        parts.append(markdown_table(header, rows, left=len(header)))
    return "\n\n".join(parts) + "\n"


def samples_table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a record's answers: a row for each `under`, a column for each `decoding`."""
    decodings = list(dict.fromkeys(answer["decoding"] for answer in record["answers"]))
    by_row: dict[str, dict[str, str]] = {}
    for answer in record["answers"]:
        text = marked(answer["text"], answer["finished"])
        by_row.setdefault(answer["under"], {})[answer["decoding"]] = text
    return ["under", *decodings], [[under, *map(cells.__getitem__, decodings)] for under, cells in by_row.items()]


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in _escaped_lines(text))


def _escaped_lines(text: str) -> Iterable[str]:
    return (escape_markdown(line) for line in text.splitlines())
