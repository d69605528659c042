"""Rows of a file, a folder or a hub data set, each with its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lpc_lightning.data.sources.files import Rows
from lpc_lightning.data.sources.locations import open_location
from lpc_lightning.data.sources.rows import SKIP, BadRow, DataError, OnBad


def read_rows(
    path: str | Path | Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    on_bad: OnBad | None = None,
) -> Rows:
    """Read rows one by one, each with its place ("pairs.jsonl line 17", "x.parquet row 3", "org/name[train] row 4").

    Supported are JSON lines (`.jsonl`, `.ndjson`, also with `.gz`), JSON (`.json`: a list of objects, an object with
    that list under `data`, or an object with such a list for each split), CSV with a header, Parquet, a pattern or a
    list of such files, a folder of such files in the layout of the hub, a folder written by `save_to_disk` of
    `datasets`, and the name of a data set on the Hugging Face hub.

    Args:
        path: File, folder, pattern, list of files, or hub name.
        config: Configuration of a hub data set.
        split: Split of a hub data set, of a folder with splits or of a JSON file with splits. Default: `train`. Other
            files have no splits.
        on_bad: Callback for each row that cannot be parsed. The row is then skipped. Default: raise at the first one.

    Raises:
        DataError: The path does not exist, has an unknown extension or no rows, or a row cannot be parsed and `on_bad`
            is None.
    """
    location = open_location(path, config)
    if split is not None and not location.has_splits:
        raise DataError(
            f"{path}: found split={split!r} for rows that have no splits of their own. Remove it. A column can still "
            "hold the splits (`data.split_column`)."
        )
    bad_rows = 0

    def bad(place: str, fault: BadRow) -> None:
        nonlocal bad_rows
        if on_bad is None:
            raise DataError(f"{place}: {fault}. Correct or remove it, or skip it: {SKIP}.")
        bad_rows += 1
        on_bad(place, fault)

    def checked() -> Rows:
        is_empty = True
        for row in location.rows(split, bad):
            is_empty = False
            yield row
        if is_empty and not bad_rows:
            raise DataError(f"{path} holds no rows. Expected at least one preference pair.")

    return checked()
