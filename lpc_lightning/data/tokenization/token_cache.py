"""Each data set is tokenized once.

An entry of the cache is a folder named by a fingerprint of all that decides its content: `pairs.arrow` (an Arrow
stream, read by memory map) and `report.json`. It is written beside its place and renamed into it, so that a process
killed halfway leaves no entry, and of two that write at once one wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa

from lpc_lightning.data.sources.example_source import ExampleSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.cache_lock import one_at_a_time
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.data.tokenization.tokens import SCHEMA, TokenStore, tokenize_examples

log = logging.getLogger(__name__)

FORMAT = 2
"""Version of the entries. Raise it whenever the same settings would now give other tokens."""


def default_cache_dir() -> Path:
    """`$LPC_LIGHTNING_CACHE`, or else `~/.cache/lpc_lightning`."""
    return Path(os.environ.get("LPC_LIGHTNING_CACHE") or "~/.cache/lpc_lightning").expanduser()


def load_or_tokenize(
    source: ExampleSource,
    template: Template,
    lengths: LengthPolicy,
    *,
    bad_rows: Literal["error", "skip"] = "error",
    cache_dir: Path | None = None,
) -> tuple[TokenStore, DataReport]:
    """The source as tokens: from the cache where it holds them, otherwise tokenized now and kept there.

    Args:
        source: Where the examples come from.
        template: What turns them into ids.
        lengths: What becomes of long pairs.
        bad_rows: `error` reads everything, then tells all rows that cannot be used in one error; `skip` leaves them
            out, counted.
        cache_dir: Root of the cache. Default: `default_cache_dir()`.

    Returns:
        The pairs, and the report of how they came about (of the run that made the entry).

    Raises:
        DataError: Nothing to read, rows that cannot be used, a pair too long under `error`, or no pair left.
    """
    if bad_rows not in ("error", "skip"):
        raise DataError(f"bad_rows={bad_rows!r}: expected 'error' or 'skip'")
    parts = [FORMAT, source.key(), template.fingerprint, asdict(lengths), bad_rows]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    root = (cache_dir or default_cache_dir()) / "tokens"
    entry = root / fingerprint[:32]
    if stored := _stored(entry):
        return stored
    with one_at_a_time(entry):
        return _stored(entry) or _make_entry(entry, source, template, lengths, bad_rows)


def _stored(entry: Path) -> tuple[TokenStore, DataReport] | None:
    if not entry.exists():
        return None
    try:
        return _open_entry(entry)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("The cached tokens in %s are damaged (%s). They are made anew.", entry, error)
        return None


def _make_entry(
    entry: Path, source: ExampleSource, template: Template, lengths: LengthPolicy, bad_rows: str
) -> tuple[TokenStore, DataReport]:
    root = entry.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        scratch = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=_UNFINISHED, dir=root))
    except OSError as error:
        raise DataError(
            f"The token cache {root} cannot be written: {error}. Set `cache_dir` or the environment variable "
            "LPC_LIGHTNING_CACHE to a folder that can."
        ) from error
    try:
        report = _write_entry(scratch, source, template, lengths, bad_rows)
        _put_in_place(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TokenStore(entry), report


_UNFINISHED = ".unfinished"


def _write_entry(
    folder: Path, source: ExampleSource, template: Template, lengths: LengthPolicy, bad_rows: str
) -> DataReport:
    start = time.perf_counter()
    report = DataReport()
    pairs = tokenize_examples(source.read(report), template, lengths, report)
    path = folder / "pairs.arrow"
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        while chunk := list(islice(pairs, 1024)):
            columns = {name: [getattr(pair, name) for pair in chunk] for name in SCHEMA.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
    if report.bad and bad_rows == "error":
        raise DataError(
            f"{sum(report.bad.values())} rows cannot be used.\n{report}\nCorrect or remove them; a fit can go on "
            "without them (`data.bad_rows: skip`)."
        )
    if not report.kept:
        raise DataError(f"No pair is left.\n{report}\nLook at the split, the columns and the length limits.")
    kept = {"sha256": _sha256(path), "report": json.loads(report.to_json())}
    (folder / "report.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    log.info("Tokenized in %.1f s: %s", time.perf_counter() - start, report)
    return report


def _open_entry(entry: Path) -> tuple[TokenStore, DataReport]:
    kept = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    report = DataReport.from_json(json.dumps(kept["report"]))
    if _sha256(entry / "pairs.arrow") != kept["sha256"]:
        raise ValueError("pairs.arrow does not have the checksum in report.json")
    return TokenStore(entry), report


def _put_in_place(scratch: Path, entry: Path) -> None:
    """Rename a finished entry into its place; where another process was faster, keep what that one made."""
    try:
        os.replace(scratch, entry)
        return
    except OSError:
        if not entry.exists():
            raise
    try:
        _open_entry(entry)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        # Renamed away first, since a folder cannot be replaced while there is something in it. Another process may
        # have done so by now.
        with tempfile.TemporaryDirectory(prefix=f"{entry.name}.", suffix=_UNFINISHED, dir=entry.parent) as aside:
            with contextlib.suppress(FileNotFoundError):
                os.replace(entry, Path(aside) / "damaged")
            _put_in_place(scratch, entry)


def _remove_leftovers(root: Path) -> None:
    """Remove what killed processes left a day ago or more."""
    for folder in root.glob(f"*{_UNFINISHED}"):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
