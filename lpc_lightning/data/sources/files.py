"""Rows of one file, each with its place: JSON lines, JSON, CSV and Parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

from lpc_lightning.data.sources.class_labels import name_labels_of_parquet
from lpc_lightning.data.sources.rows import SKIP, BadRow, DataError, OnBad, Row, undecoded
from lpc_lightning.data.sources.strict_json import JsonParser, Marked

Rows: TypeAlias = Iterator[tuple[str, Row]]
Reader: TypeAlias = Callable[[Path, str, OnBad, str | None], Rows]
"""Function from a file, its name in places, a callback for bad rows and a column to the rows with their places. If the
column is not None, other columns may be left out."""


def reader_of(path: Path) -> Reader:
    """Return the reader of a file by the ending of its name.

    Raises:
        DataError: The ending is unknown.
    """
    for ending, reader in READERS.items():
        if path.name.lower().endswith(ending):
            return reader
    raise DataError(f"{path}: found the extension {path.suffix!r}, expected one of {', '.join(READERS)}.")


def has_known_ending(path: str) -> bool:
    """Return True if a path ends like a file that can be read."""
    return path.lower().endswith(tuple(READERS))


def _json_lines(path: Path, name: str, bad: OnBad, only: str | None) -> Rows:
    # A line without the name of the column cannot have the column, and is not parsed.
    key = f'"{only}"'.encode() if only is not None and only.isascii() and only.isprintable() else b""
    with _open_bytes(path) as file:
        # Bytes are split at \n only. In text mode, U+2028 inside a string would end a line and shift the line numbers.
        for number, raw in enumerate(_bytes_lines(path, file), 1):
            place = f"{name} line {number}"
            if key not in raw:
                continue
            parser = JsonParser()
            try:
                line = raw.removeprefix(codecs.BOM_UTF8).decode() if number == 1 else raw.decode()
                if not line.strip():
                    continue
                row = parser.parse(line)
            except UnicodeDecodeError as error:
                bad(place, BadRow("invalid UTF-8", f"{error.reason} at byte {error.start} of the line"))
            except (ValueError, RecursionError) as error:
                bad(place, BadRow("invalid JSON", f"{error}; the line begins with {line[:60]!r}"))
            else:
                yield from _checked(row, place, parser, bad)


def _json(path: Path, name: str, bad: OnBad, only: str | None) -> Rows:
    parser = JsonParser()
    content = parse_json(path, parser)
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise DataError(
            f"{path} holds a JSON {type(content).__name__}. Expected a list of objects, an object with such a list "
            "under 'data', or an object with such a list for each split. A file with splits must be the only file of "
            "its path, no part of a list, a pattern or a folder: save its splits as files."
        )
    yield from json_rows(rows, name, parser, bad)


def json_rows(rows: list[Any], name: str, parser: JsonParser, bad: OnBad) -> Rows:
    """Yield the rows of a list that `parser` has parsed."""
    for number, row in enumerate(rows, 1):
        yield from _checked(row, f"{name} row {number}", parser, bad)


def parse_json(path: Path, parser: JsonParser) -> Any:
    """Parse a JSON file.

    Raises:
        DataError: The file is not JSON, or it is nested too deep.
    """
    try:
        content = parser.parse_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8.") from error
    except RecursionError as error:
        raise DataError(
            f"{path}: found a value that is nested too deep to be parsed, expected rows of a few levels. Remove it, or "
            f"save the rows as JSON lines (.jsonl), of which a single row can be left out: {SKIP}."
        ) from error
    except ValueError as error:
        line, message = getattr(error, "lineno", 1), getattr(error, "msg", str(error))
        raise DataError(
            f"{path} line {line} is not JSON: {message}. Expected one list of objects. A file with one object per line "
            "must be named .jsonl."
        ) from error
    if isinstance(content, Marked):
        raise DataError(f"{path}: {content.fault}. Correct it.")
    return content


def _checked(row: Any, place: str, parser: JsonParser, bad: OnBad) -> Rows:
    """Yield a row that has no fault."""
    fault = parser.fault(row)
    if fault is None and not isinstance(row, dict):
        detail = f"found a JSON {type(row).__name__}, expected an object with one key per column"
        fault = BadRow("not an object", detail)
    if fault is not None:
        bad(place, fault)
    else:
        yield place, row


def _csv(path: Path, name: str, bad: OnBad, only: str | None) -> Rows:
    # The default limit of 131,072 characters per cell is too small for a long conversation.
    csv.field_size_limit(2**31 - 1)
    # Bytes that are not UTF-8 are substituted, so that a row can be left out.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            if fault := undecoded(",".join(header), "the header"):
                raise DataError(f"{path} line 1: {fault}. Save the file as UTF-8.")
            _refuse_repeated(path, header)
            start = lines.line_num + 1
            for cells in lines:
                place, start = f"{name} line {start}", lines.line_num + 1
                if len(cells) == len(header):
                    row = dict(zip(header, cells, strict=True))
                    faults = (undecoded(cell, f"the column {column!r}") for column, cell in row.items())
                    if fault := next(filter(None, faults), None):
                        bad(place, fault)
                    else:
                        yield place, row
                elif cells:
                    detail = f"found {len(cells)} fields, expected {len(header)} as in the header"
                    bad(place, BadRow("wrong number of fields", detail))
        except csv.Error as error:
            raise DataError(f"{path} line {lines.line_num} is not CSV: {error}. Correct the quotes there.") from error


def _parquet(path: Path, name: str, bad: OnBad, only: str | None) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        _refuse_repeated(path, names)
        if only is not None and only not in names:
            return
        named = name_labels_of_parquet(file.schema_arrow.metadata)
        for batch in file.iter_batches(batch_size=1024, columns=None if only is None else [only]):
            for index, row in enumerate(_decoded(batch), number + 1):
                place = f"{name} row {index}"
                if isinstance(row, BadRow):
                    bad(place, row)
                else:
                    yield place, row if named is None else named(row)
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet after row {number}: {error}. Write the file again."
        ) from error


def _decoded(batch: Any) -> list[Row | BadRow]:
    """Return the rows of a batch. A row whose text is not UTF-8 is a `BadRow`."""
    try:
        rows: list[Row | BadRow] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [BadRow("invalid UTF-8", f"{error.reason} at byte {error.start} of a text")]
        return [row for index in range(batch.num_rows) for row in _decoded(batch.slice(index, 1))]


def _refuse_repeated(path: Path, names: list[str]) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path}: found the columns {repeated} more than once, expected a name for each column.")


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".jsonl.gz": _json_lines,
    ".ndjson.gz": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Readers by the ending of a file's name."""


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _bytes_lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}. Compress it again.") from error
