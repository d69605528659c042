"""CSV files that are complete or absent."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpc_lightning.files.json_files import write_text


def write_csv(path: Path, records: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write records as CSV, with a column for each name in any record. None and missing values give empty cells.

    Args:
        path: Target. Its folder exists.
        records: Rows by name of the column, in full precision. May be empty.
        columns: Names of the first columns. They are needed if there may be no record: pandas reads no file without a
            header.
    """
    table = io.StringIO(newline="")
    names = dict.fromkeys([*columns, *(name for record in records for name in record)])
    writer = csv.DictWriter(table, list(names))
    writer.writeheader()
    writer.writerows(records)
    write_text(path, table.getvalue())
