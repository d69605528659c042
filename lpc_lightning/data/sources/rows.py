"""Rows from a file, a saved folder or a hub data set, each with its place in the file."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from datasets import Dataset

Row: TypeAlias = dict[str, Any]
"""One row: cells by column name."""

Reason: TypeAlias = Literal[
    "invalid UTF-8",
    "invalid JSON",
    "not an object",
    "wrong number of fields",
    "missing answer",
    "empty answer",
    "equal answers",
    "no prompt",
    "empty prompt",
    "prompt does not end in a user turn",
    "prompt differs from the conversations",
    "conversations differ before the last turn",
    "conversation does not end in an answer",
    "unknown role",
    "unknown form",
    "unknown label",
    "ambiguous columns",
    "ambiguous message",
    "message list as text",
    "rendered text",
    "wrong type",
    "invalid text",
    "refused by the chat template",
    "left out by the chat template",
    "two think blocks",
    "end token in answer",
]
"""Reasons why a row cannot be used. They are keys of counters and, as `data/bad/...`, names of metrics."""


class DataError(ValueError):
    """Raised when data cannot be used. The message has the place, the value, what was expected and what to do."""


class BadRow(ValueError):  # noqa: N818 - a bad row is counted, and is an error only if the settings require it
    """Raised for one row that cannot be used.

    Args:
        reason: Key of the counter for this row.
        detail: What was found in the row, and what was expected.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


class Tie(ValueError):  # noqa: N818 - a tie is no error: the row is dropped and counted
    """Raised for one row whose label prefers neither answer."""


OnBad: TypeAlias = Callable[[str, BadRow], None]
"""Callback for a row that cannot be parsed, with its place and its fault."""


def read_rows(
    path: str | Path, *, config: str | None = None, split: str | None = None, on_bad: OnBad | None = None
) -> Iterator[tuple[str, Row]]:
    """Read rows one by one, each with its place ("pairs.jsonl line 17", "x.parquet row 3", "org/name[train] row 4").

    Supported are JSON lines (`.jsonl`, `.ndjson`, also with `.gz`), JSON (`.json`: a list of objects, or an object with
    that list under `data`), CSV with a header, Parquet, a folder written by `save_to_disk` of `datasets`, and the name
    of a data set on the Hugging Face hub.

    Args:
        path: File, folder or hub name.
        config: Configuration of a hub data set.
        split: Split of a hub data set or of a saved folder. Default: `train`. Plain files have no splits.
        on_bad: Callback for each line that cannot be parsed. The line is then skipped. Default: raise at the first one.

    Raises:
        DataError: The path does not exist, has an unknown extension or no rows, or a line cannot be parsed and `on_bad`
            is None.
    """
    local = Path(path).expanduser()
    bad_rows = 0

    def bad(place: str, fault: BadRow) -> None:
        nonlocal bad_rows
        if on_bad is None:
            raise DataError(f"{place}: {fault}. Correct or remove it; a fit can skip it (`data.bad_rows: skip`).")
        bad_rows += 1
        on_bad(place, fault)

    if local.is_file():
        reader = _reader_of(local)
        if config is not None or split is not None:
            raise DataError(
                f"{local}: found config={config!r} and split={split!r} for a plain file, which has neither. Remove "
                "both. A column of the file can still hold the splits (`data.split_column`)."
            )
        rows = reader(local, bad)
    else:
        rows = _dataset_rows(*_open_dataset(str(path), config, split))

    def checked() -> Iterator[tuple[str, Row]]:
        is_empty = True
        for row in rows:
            is_empty = False
            yield row
        if is_empty and not bad_rows:
            raise DataError(f"{path} holds no rows. Expected at least one preference pair.")

    return checked()


def source_key(path: str | Path, *, config: str | None = None, split: str | None = None) -> str:
    """Return a text that changes whenever `read_rows` would yield other rows or other places.

    For a file it holds the name and the SHA-256 of the bytes. For a folder or a hub data set it holds the fingerprint
    computed by `datasets`.

    Raises:
        DataError: The path does not exist, as in `read_rows`.
    """
    local = Path(path).expanduser()
    if local.is_file():
        with local.open("rb") as file:
            return f"file {local.name} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    name, dataset = _open_dataset(str(path), config, split)
    return f"dataset {name} {dataset._fingerprint}"


def _json_lines(path: Path, bad: OnBad) -> Iterator[tuple[str, Row]]:
    with _open_bytes(path) as file:
        # Bytes are split at \n only. In text mode, U+2028 inside a string would end a line and shift the line numbers.
        for number, raw in enumerate(_bytes_lines(path, file), 1):
            place = f"{path.name} line {number}"
            try:
                line = raw.removeprefix(codecs.BOM_UTF8).decode() if number == 1 else raw.decode()
                if not line.strip():
                    continue
                row = json.loads(line)
            except UnicodeDecodeError as error:
                bad(place, BadRow("invalid UTF-8", f"{error.reason} at byte {error.start} of the line"))
            except (ValueError, RecursionError) as error:
                bad(place, BadRow("invalid JSON", f"{error}; the line begins with {line[:60]!r}"))
            else:
                if isinstance(row, dict):
                    yield place, row
                else:
                    bad(place, _not_an_object(row))


def _json(path: Path, bad: OnBad) -> Iterator[tuple[str, Row]]:
    try:
        content = json.loads(path.read_bytes().removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} line {error.lineno} is not JSON: {error.msg}. Expected one list of objects. A file with one "
            "object per line must be named .jsonl."
        ) from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a JSON {type(content).__name__}. Expected a list of objects, or an object with such a list "
            "under 'data'."
        )
    for number, row in enumerate(rows, 1):
        place = f"{path.name} row {number}"
        if isinstance(row, dict):
            yield place, row
        else:
            bad(place, _not_an_object(row))


def _csv(path: Path, bad: OnBad) -> Iterator[tuple[str, Row]]:
    # The default limit of 131,072 characters per cell is too small for a long conversation.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            start = lines.line_num + 1
            for cells in lines:
                place, start = f"{path.name} line {start}", lines.line_num + 1
                if len(cells) == len(header):
                    yield place, dict(zip(header, cells, strict=True))
                elif cells:
                    detail = f"found {len(cells)} fields, expected {len(header)} as in the header"
                    bad(place, BadRow("wrong number of fields", detail))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 after line {lines.line_num}: {error.reason}. Save it as UTF-8."
            ) from error
        except csv.Error as error:
            raise DataError(f"{path} line {lines.line_num} is not CSV: {error}. Correct the quotes there.") from error


def _parquet(path: Path, bad: OnBad) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path.name} row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet after row {number}: {error}. Write the file again."
        ) from error


_READERS: dict[str, Callable[[Path, OnBad], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".jsonl.gz": _json_lines,
    ".ndjson.gz": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _reader_of(path: Path) -> Callable[[Path, OnBad], Iterator[tuple[str, Row]]]:
    name = path.name.lower()
    for ending, reader in _READERS.items():
        if name.endswith(ending):
            return reader
    raise DataError(f"{path}: found the extension {path.suffix!r}, expected one of {', '.join(_READERS)}.")


def _not_an_object(row: object) -> BadRow:
    return BadRow("not an object", f"found a JSON {type(row).__name__}, expected an object with one key per column")


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _bytes_lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}. Compress it again.") from error


def _open_dataset(path: str, config: str | None, split: str | None) -> tuple[str, Dataset]:
    """Open a saved folder or a hub data set. Return it with the name that is used in the places of its rows."""
    import datasets

    local = Path(path).expanduser()
    split = split or "train"
    name = f"{local.name if local.is_dir() else path}[{split}]"
    if not local.is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") > 1 or _has_file_extension(path)):
        raise DataError(f"There is no file or folder {path} (looked at {local.absolute()}).")
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(path) if local.is_dir() else datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the hub raises many kinds of exceptions
        content = ", ".join(sorted(p.name for p in local.iterdir())[:5]) if local.is_dir() else ""
        raise DataError(
            f"The folder {path} was not written by `save_to_disk` of datasets: {error}. It holds: "
            f"{content or 'nothing'}."
            if local.is_dir()
            else f"There is no local file {path}, and the hub could not be read for {name}, configuration {config}: "
            f"{type(error).__name__}: {error}. Use the path of a file, or an existing hub name, configuration and "
            "split."
        ) from error
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(f"{path} has no split {split!r}. It has: {', '.join(loaded)}.")
        return name, loaded[split]
    return name, loaded


def _has_file_extension(path: str) -> bool:
    return path.lower().endswith(tuple(_READERS))


def _dataset_rows(name: str, dataset: Dataset) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(dataset, 1):
        yield f"{name} row {number}", row
