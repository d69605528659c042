"""Rows from a file, a saved folder or a hub data set, each with the place it came from."""

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
"""One row: column name -> cell."""

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
    "wrong type",
    "invalid text",
    "refused by the chat template",
    "end token in answer",
]
"""Why a row cannot be used. These are counter keys and, as `data/bad/...`, metric names."""


class DataError(ValueError):
    """Data that cannot be used. The message names the place, what was found, what was expected and what to do."""


class BadRow(ValueError):  # noqa: N818 - it is counted, and an error only where the settings say so
    """One row that cannot be used.

    Args:
        reason: The counter under which it goes.
        detail: What was found in this row, and what was expected.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


OnBad: TypeAlias = Callable[[str, BadRow], None]
"""Told the place and the fault of each row that could not be read."""


def read_rows(
    path: str | Path, *, config: str | None = None, split: str | None = None, on_bad: OnBad | None = None
) -> Iterator[tuple[str, Row]]:
    """Read rows one by one, each with its place ("pairs.jsonl line 17", "x.parquet row 3", "org/name[train] row 4").

    Known are JSON lines (`.jsonl`, `.ndjson`, either also with `.gz`), JSON (`.json`: a list of objects, or an object
    with that list under `data`), CSV with a header, Parquet, a folder written by `datasets`' `save_to_disk`, and a data
    set's name on the Hugging Face hub.

    Args:
        path: A file, a folder or a hub name.
        config: Configuration of a hub data set.
        split: Split of a hub data set or of a saved folder. Default: `train`. Plain files have none.
        on_bad: Told of each line that cannot be read, which is then left out. Default: the first one raises.

    Raises:
        DataError: Nothing there, an unknown ending, no rows, or a line that cannot be read while `on_bad` is None.
    """
    local = Path(path).expanduser()
    counted = 0

    def bad(place: str, fault: BadRow) -> None:
        nonlocal counted
        if on_bad is None:
            raise DataError(f"{place}: {fault}. Correct or remove it; a fit may skip it (`data.bad_rows: skip`).")
        counted += 1
        on_bad(place, fault)

    if local.is_file():
        reader = _reader_of(local)
        if config is not None or split is not None:
            raise DataError(
                f"{local} is a plain file, which has no configurations or splits of its own, but config={config!r} and "
                f"split={split!r} were asked of it. Leave both out; a column of the file can still tell its splits."
            )
        rows = reader(local, bad)
    else:
        rows = _dataset_rows(*_open_dataset(str(path), config, split))

    def checked() -> Iterator[tuple[str, Row]]:
        found = False
        for row in rows:
            found = True
            yield row
        if not found and not counted:
            raise DataError(f"{path} holds no rows. Expected at least one preference pair.")

    return checked()


def source_key(path: str | Path, *, config: str | None = None, split: str | None = None) -> str:
    """A text that changes whenever `read_rows` would give other rows or other places.

    For a file its name and the SHA-256 of its bytes; for a folder or a hub data set the fingerprint that `datasets`
    keeps.

    Raises:
        DataError: As `read_rows` does where there is nothing to read.
    """
    local = Path(path).expanduser()
    if local.is_file():
        with local.open("rb") as file:
            return f"file {local.name} {hashlib.file_digest(file, 'sha256').hexdigest()}"
    name, dataset = _open_dataset(str(path), config, split)
    return f"dataset {name} {dataset._fingerprint}"


def _json_lines(path: Path, bad: OnBad) -> Iterator[tuple[str, Row]]:
    with _open_bytes(path) as file:
        # Bytes are split at \n alone: as text, U+2028 inside a string would end a line and shift every number after it.
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
            f"{path} line {error.lineno} is not JSON: {error.msg}. Expected one list of objects; a file with "
            "one object a line is named .jsonl."
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
    # The module's limit of 131,072 characters a cell is less than a long conversation.
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
                    found = f"{len(cells)} fields under a header of {len(header)}"
                    bad(place, BadRow("wrong number of fields", found))
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
        raise DataError(f"{path} is not readable as Parquet after row {number}: {error}") from error


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
    raise DataError(f"{path} has an unknown ending {path.suffix!r}. Known endings: {', '.join(_READERS)}.")


def _not_an_object(row: object) -> BadRow:
    return BadRow("not an object", f"found a JSON {type(row).__name__}, expected an object with one key a column")


def _open_bytes(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _bytes_lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    try:
        yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}. Compress it again.") from error


def _open_dataset(path: str, config: str | None, split: str | None) -> tuple[str, Dataset]:
    """A saved folder or a hub data set, under the name that its places carry."""
    import datasets

    local = Path(path).expanduser()
    wanted = split or "train"
    name = f"{local.name if local.is_dir() else path}[{wanted}]"
    if not local.is_dir() and (path.startswith(("/", ".", "~")) or path.count("/") > 1 or _ends_like_a_file(path)):
        raise DataError(f"There is no file or folder {path} (looked at {local.absolute()}).")
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_from_disk(path) if local.is_dir() else datasets.load_dataset(path, config, split=wanted)
    except Exception as error:  # the hub fails in as many ways as there are networks
        inside = ", ".join(sorted(p.name for p in local.iterdir())[:5]) if local.is_dir() else ""
        raise DataError(
            f"The folder {path} was not written by datasets' save_to_disk: {error}. It holds: {inside or 'nothing'}."
            if local.is_dir()
            else f"There is no local file {path}, and the hub could not be read for {name}, configuration {config}: "
            f"{type(error).__name__}: {error}. Give a file's path, or a hub name, configuration and split that exist."
        ) from error
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()
    if isinstance(loaded, dict):
        if wanted not in loaded:
            raise DataError(f"{path} has no split {wanted!r}. It has: {', '.join(loaded)}.")
        return name, loaded[wanted]
    return name, loaded


def _ends_like_a_file(path: str) -> bool:
    return path.lower().endswith(tuple(_READERS))


def _dataset_rows(name: str, dataset: Dataset) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(dataset, 1):
        yield f"{name} row {number}", row
