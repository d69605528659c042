"""Cache of tokenized data sets.

An entry of the cache is a folder. Its name is a fingerprint of everything that determines its content. It holds
`pairs.arrow` (an Arrow stream, read through a memory map) and `report.json`. An entry is written to a temporary folder
and then renamed. So a process that is killed leaves no incomplete entry, and if two processes write the same entry, one
of them is kept.
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

FORMAT = 5
"""Version of the entries. Increase it when the same settings give other tokens or other columns."""


def default_cache_dir() -> Path:
    """Return `$LPC_LIGHTNING_CACHE` if it is set, and `~/.cache/lpc_lightning` otherwise."""
    return Path(os.environ.get("LPC_LIGHTNING_CACHE") or "~/.cache/lpc_lightning").expanduser()


def load_or_tokenize(
    source: ExampleSource,
    template: Template,
    lengths: LengthPolicy,
    *,
    bad_rows: Literal["error", "skip"] = "error",
    cache_dir: Path | None = None,
) -> tuple[TokenStore, DataReport]:
    """Load the tokens of a source from the cache, or tokenize the source and store the result in the cache.

    Args:
        source: Source of the examples.
        template: Template that converts the text to token ids.
        lengths: Policy for pairs that are too long.
        bad_rows: `error` reads everything and then raises one error that lists the invalid rows. `skip` drops and
            counts invalid rows.
        cache_dir: Root folder of the cache. Default: `default_cache_dir()`.

    Returns:
        The pairs, and the report of the run that made the entry.

    Raises:
        DataError: The source is empty, rows are invalid, a pair is too long under `error`, or no pair is left.
    """
    if bad_rows not in ("error", "skip"):
        raise DataError(f"bad_rows={bad_rows!r}: expected 'error' or 'skip'")
    parts = [FORMAT, source.key(), template.fingerprint, asdict(lengths), bad_rows]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    root = (cache_dir or default_cache_dir()) / "tokens"
    entry = root / fingerprint[:32]
    if stored := _load_entry(entry):
        return stored
    with one_at_a_time(entry):
        return _load_entry(entry) or _make_entry(entry, source, template, lengths, bad_rows)


def _load_entry(entry: Path) -> tuple[TokenStore, DataReport] | None:
    """Open an entry. Return None if it does not exist or is damaged."""
    if not entry.exists():
        return None
    try:
        return _open_entry(entry)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        log.warning("The cached tokens in %s are damaged (%s). The data set is tokenized again.", entry, error)
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
            "LPC_LIGHTNING_CACHE to a writable folder."
        ) from error
    try:
        report = _write_entry(scratch, source, template, lengths, bad_rows)
        _move_entry(scratch, entry)
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
            f"{sum(report.bad.values())} rows cannot be used.\n{report}\nCorrect or remove them, or set "
            "`data.bad_rows: skip` to train without them."
        )
    if not report.kept:
        raise DataError(f"No pair is left.\n{report}\nCheck the split, the columns and the length limits.")
    metadata = {"sha256": _sha256(path), "report": json.loads(report.to_json())}
    (folder / "report.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    log.info("Tokenized in %.1f s: %s", time.perf_counter() - start, report)
    return report


def _open_entry(entry: Path) -> tuple[TokenStore, DataReport]:
    metadata = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    report = DataReport.from_json(json.dumps(metadata["report"]))
    if _sha256(entry / "pairs.arrow") != metadata["sha256"]:
        raise ValueError("pairs.arrow does not have the checksum in report.json")
    return TokenStore(entry), report


def _move_entry(scratch: Path, entry: Path) -> None:
    """Rename a finished entry to its final path. Keep a valid entry that another process has made meanwhile."""
    try:
        os.replace(scratch, entry)
        return
    except OSError:
        if not entry.exists():
            raise
    try:
        _open_entry(entry)
    except (OSError, ValueError, KeyError, pa.ArrowException):
        # A folder that is not empty cannot be replaced, so the damaged one is renamed first. Another process may have
        # renamed it already.
        with tempfile.TemporaryDirectory(prefix=f"{entry.name}.", suffix=_UNFINISHED, dir=entry.parent) as aside:
            with contextlib.suppress(FileNotFoundError):
                os.replace(entry, Path(aside) / "damaged")
            _move_entry(scratch, entry)


def _remove_leftovers(root: Path) -> None:
    """Remove unfinished folders of killed processes that are at least one day old."""
    for folder in root.glob(f"*{_UNFINISHED}"):
        if time.time() - folder.stat().st_mtime > 24 * 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
