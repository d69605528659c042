"""Cache of tokenized data sets.

An entry of the cache is a folder. Its name is a fingerprint of everything that determines its content: the rows, the
template, the settings, the code and the libraries. It holds `pairs.arrow` (an Arrow stream, read through a memory map)
and `report.json` with the digests of both. An entry is written to a temporary folder and then renamed. So a killed
process leaves no incomplete entry, and if two processes write the same entry, one of them is kept. A damaged entry is
repaired by replacing its files, and its folder stays where it is. Another process can rename or remove an entry at any
time: the pairs that were made or read remain open.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import jinja2
import pyarrow as pa
import tokenizers
import transformers

from lpc_lightning.data.sources.example_source import ExampleSource
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import SKIP, DataError
from lpc_lightning.data.tokenization.cache_lock import one_at_a_time
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.template import Template
from lpc_lightning.data.tokenization.tokens import SCHEMA, TokenStore, tokenize_examples
from lpc_lightning.files.integrity import code_digest, digest_of
from lpc_lightning.files.plain_values import plain
from lpc_lightning.files.unfinished import remove_leftovers, unfinished_path

log = logging.getLogger(__name__)

PAIRS, REPORT = "pairs.arrow", "report.json"
"""Files of an entry."""
CODE = ("data/sources", "data/tokenization")
"""Folders whose code determines the tokens."""
DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException)
"""Errors of reading a damaged entry."""
ATTEMPTS = 20
"""Attempts to store an entry whose folder other processes rename."""


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
        raise DataError(f"data.bad_rows: found {bad_rows!r}, expected 'error' or 'skip'.")
    parts = [_versions(), source.key(), template.fingerprint, plain(asdict(lengths)), bad_rows]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    root = (cache_dir or default_cache_dir()) / "tokens"
    entry = root / fingerprint[:32]
    if stored := _load_entry(entry):
        return stored
    with one_at_a_time(entry):
        return _load_entry(entry) or _make_entry(entry, source, template, lengths, bad_rows)


def _versions() -> list[str]:
    """Return a digest of the code and the versions of the libraries that determine the tokens."""
    return [code_digest(*CODE), transformers.__version__, tokenizers.__version__, jinja2.__version__]


def _load_entry(entry: Path) -> tuple[TokenStore, DataReport] | None:
    """Open an entry. Return None if it does not exist or is damaged."""
    if not entry.exists():
        return None
    try:
        return _open_entry(entry)
    except DAMAGES as error:
        if entry.exists():  # otherwise another process has renamed it meanwhile
            log.warning("The cached tokens in %s are damaged (%s). The data set is tokenized again.", entry, error)
        return None


def _make_entry(
    entry: Path, source: ExampleSource, template: Template, lengths: LengthPolicy, bad_rows: str
) -> tuple[TokenStore, DataReport]:
    root = entry.parent
    scratch = unfinished_path(root, entry.name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_leftovers(root)
        scratch.mkdir()
    except OSError as error:
        raise DataError(
            f"The token cache {root} cannot be written: {error}. Set `cache_dir` or the environment variable "
            "LPC_LIGHTNING_CACHE to a writable folder."
        ) from error
    try:
        report = _write_entry(scratch, source, template, lengths, bad_rows)
        # Opened before it is moved, because another process may rename it.
        store = TokenStore(scratch)
        store.folder = entry
        _move_entry(scratch, entry)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return store, report


def _write_entry(
    folder: Path, source: ExampleSource, template: Template, lengths: LengthPolicy, bad_rows: str
) -> DataReport:
    start = time.perf_counter()
    report = DataReport()
    pairs = tokenize_examples(source.read(report), template, lengths, report)
    path = folder / PAIRS
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        while chunk := list(islice(pairs, 1024)):
            columns = {name: [getattr(pair, name) for pair in chunk] for name in SCHEMA.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
    if report.bad and bad_rows == "error":
        raise DataError(
            f"{sum(report.bad.values())} rows cannot be used.\n{report}\nCorrect or remove them, or leave "
            f"them out: {SKIP}."
        )
    if report.read and sum(report.other_splits.values()) == report.read:
        raise DataError(
            f"No row belongs to the split that is read.\n{report}\nThe rows belong to "
            f"{', '.join(report.other_splits)}. Set the split (data.test_split and its like; adapt: `--split`) to one "
            "that they have, or take a file with rows of that split: evaluate scores the split test."
        )
    if not report.kept:
        raise DataError(
            f"No pair is left.\n{report}\nCheck the split, the columns, the length limits and the hold-out. Pairs of a "
            "single prompt are held out by pair (`validation_by: pair`), a single pair is not (`validation_share: 0`)."
        )
    metadata = {"sha256": digest_of(path), "report": json.loads(report.to_json())}
    content = json.dumps(metadata | {"digest": _digest(metadata)}, indent=1)
    (folder / REPORT).write_text(content, encoding="utf-8")
    log.info("Tokenized in %.1f s: %s", time.perf_counter() - start, report)
    return report


def _open_entry(entry: Path) -> tuple[TokenStore, DataReport]:
    metadata = json.loads((entry / REPORT).read_text(encoding="utf-8"))
    digest = metadata.pop("digest")
    if digest != _digest(metadata):
        raise ValueError(f"{REPORT} does not have its digest")
    if digest_of(entry / PAIRS) != metadata["sha256"]:
        raise ValueError(f"{PAIRS} does not have the digest in {REPORT}")
    return TokenStore(entry), DataReport.from_json(json.dumps(metadata["report"]))


def _digest(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _move_entry(scratch: Path, entry: Path) -> None:
    """Rename a finished entry to its final path. Keep a valid entry that another process has made meanwhile.

    Raises:
        OSError: The cache is full or not writable.
    """
    failure: OSError | None = None
    for _ in range(ATTEMPTS):
        try:
            scratch.rename(entry)
            return
        except OSError as error:
            failure = error
        try:
            _open_entry(entry)
            return
        except DAMAGES:
            try:
                _repair(entry, scratch)
                return
            except FileNotFoundError as error:  # another process has renamed the folder meanwhile
                failure = error
    assert failure is not None
    raise failure


def _repair(entry: Path, scratch: Path) -> None:
    """Replace the files of a damaged entry. A folder that is not empty cannot be replaced, and it is not removed."""
    if not entry.is_dir():
        entry.unlink()  # a file, or a link to nothing
        scratch.rename(entry)
        return
    for name in (PAIRS, REPORT):
        copy = entry / f"{name}.{uuid4().hex}"
        shutil.copyfile(scratch / name, copy)
        copy.replace(entry / name)
