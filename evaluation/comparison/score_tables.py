"""Tables of the scores that RM-Bench and RewardBench define, for one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpc_lightning.files.csv_files import write_csv
from lpc_lightning.files.json_files import write_text
from lpc_lightning.files.markdown import markdown_table

TABLE = "reward_benchmarks"
"""Name of the files."""


def score_tables(records: Mapping[str, Any]) -> dict[str, str]:
    """Return a table in Markdown for each file of a benchmark, by task: a score a row, a mode and a scale a column.

    Args:
        records: Records of a model's results, by task.
    """
    tables = {}
    for task, record in records.items():
        if scores := record.get("scores"):
            names = dict.fromkeys(name for values in scores.values() for name in values)
            rows = [
                [name, *("-" if name not in values else f"{values[name]:.4f}" for values in scores.values())]
                for name in names
            ]
            dropped = sum(record["dropped"].values())
            title = f"{task}, {record['form']}: {record['items']} pairs, {dropped} dropped"
            tables[task] = markdown_table([title, *scores], rows)
    return tables


def write_score_tables(folder: Path, records: Mapping[str, Any]) -> None:
    """Write `reward_benchmarks.md` and `.csv` into an existing folder. Without benchmarks, write nothing."""
    tables = score_tables(records)
    if not tables:
        return
    write_text(folder / f"{TABLE}.md", "\n\n".join(tables.values()) + "\n")
    rows = [
        {"task": task, "form": records[task]["form"], "score": name, "mode": mode, "scale": scale, "value": value}
        for task in tables
        for column, values in records[task]["scores"].items()
        for mode, scale in [column.split("/")]
        for name, value in values.items()
    ]
    write_csv(folder / f"{TABLE}.csv", rows)
