"""Examples -> tokenized pairs, kept on disk so that each data set is tokenized once.

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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lpc_lightning.data.formats import Columns, to_example
from lpc_lightning.data.lengths import LengthPolicy
from lpc_lightning.data.report import DataReport
from lpc_lightning.data.rows import BadRow, DataError, read_rows, source_key
from lpc_lightning.data.splits import held_out, select_split
from lpc_lightning.data.template import Template
from lpc_lightning.types import PreferenceExample, TokenizedPair

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the entries. Raise it whenever the same settings would now give other tokens."""

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("chosen_ids", pa.list_(pa.int32())),
        ("rejected_ids", pa.list_(pa.int32())),
        ("source", pa.string()),
        ("factor", pa.string()),
        ("annotator", pa.string()),
        ("flipped", pa.bool_()),
    ]
)
assert _SCHEMA.names == [f.name for f in fields(TokenizedPair)]


class ExampleSource(Protocol):
    """Something that gives examples, and can tell whether they are still the same ones."""

    def key(self) -> str:
        """A text that changes whenever `read` would give other examples."""
        ...

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """The examples, with every row on the way counted in `report`."""
        ...


@dataclass(frozen=True)
class RowSource:
    """The examples in a file, a saved folder or a hub data set (see `read_rows` for the known kinds)."""

    path: str
    """A file, a folder or a hub name."""
    config: str | None = None
    """Configuration of a hub data set."""
    dataset_split: str | None = None
    """Split of a hub data set or a saved folder, such as `train_prefs`. None: `train`."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns."""
    split: str | None = None
    """Take only rows whose split column says this; a row without one counts as `train`. None: all rows."""
    split_column: str = "split"
    """The column that `split` looks at."""
    held_out: bool | None = None
    """True: only the prompts held out. False: only the others. None: all."""
    held_out_share: float = 0.0
    """Share of prompts to hold out, in [0, 1], by a hash of the prompt's text."""
    held_out_seed: int = 0
    """Another seed holds out other prompts."""

    def key(self) -> str:
        """See `ExampleSource.key`."""
        settings = {name: value for name, value in asdict(self).items() if name != "path"}
        content = source_key(self.path, config=self.config, split=self.dataset_split)
        return json.dumps([content, settings], sort_keys=True)

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        rows = read_rows(self.path, config=self.config, split=self.dataset_split, on_bad=report.count_unread)
        rows = report.counting(rows)
        if self.split is not None:
            rows = select_split(rows, self.split, self.split_column, report.count_other_split)
        for place, row in rows:
            try:
                example = to_example(row, place, self.columns)
            except BadRow as fault:
                report.count_bad(place, fault)
                continue
            if self._is_wanted(example):
                yield example
            else:
                report.held_apart += 1

    def _is_wanted(self, example: PreferenceExample) -> bool:
        if self.held_out is None:
            return True
        return self.held_out == held_out(example.prompt, self.held_out_share, self.held_out_seed)


@dataclass(frozen=True)
class ExamplesInMemory:
    """Examples that are already there, such as generated ones."""

    examples: Sequence[PreferenceExample]
    name: str
    """A text that names this very content: the generator's settings and seed, for example."""

    def key(self) -> str:
        """See `ExampleSource.key`."""
        return f"memory {self.name}"

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        return report.counting(self.examples)


def tokenize_examples(
    examples: Iterable[PreferenceExample], template: Template, lengths: LengthPolicy, report: DataReport
) -> Iterator[TokenizedPair]:
    """Tokenize examples one by one; those that cannot be used or are too long are left out and counted.

    Args:
        examples: The pairs as text.
        template: What turns them into ids.
        lengths: What becomes of long ones.
        report: Where all of them are counted.

    Raises:
        DataError: A pair is too long, and the length policy is `error`.
    """
    for example in examples:
        try:
            pair = template.tokenize(example)
        except BadRow as fault:
            report.count_bad(f"id {example.id!r}", fault)
            continue
        fitted = lengths(pair, template.bos_id)
        if fitted.pair is None:
            report.count_dropped(fitted.dropped)
            continue
        if fitted.cut:
            report.count_cut(fitted.cut)
        report.kept += 1
        yield fitted.pair


class TokenStore(Sequence[TokenizedPair]):
    """Tokenized pairs on disk, read by memory map. It pickles as its path, so that workers open the file themselves.

    Args:
        folder: An entry of the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with pa.memory_map(str(folder / "pairs.arrow")) as file:
            self._table = pa.ipc.open_stream(file).read_all()
        if self._table.schema != _SCHEMA:
            raise pa.ArrowInvalid(f"{folder} holds other columns: {self._table.schema.names}")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return TokenizedPair(*(column[index % len(self)].as_py() for column in self._table.columns))

    @property
    def piece_lengths(self) -> np.ndarray:
        """(pairs, 3) tokens of each prompt, chosen and rejected completion."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return np.stack([pc.list_value_length(self._table[name]).to_numpy() for name in names], axis=1)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each pair: its prompt once and both completions."""
        return [int(total) for total in self.piece_lengths.sum(axis=1)]


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
    if entry.exists():
        try:
            return _open_entry(entry)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            log.warning("The cached tokens in %s are damaged (%s). They are made anew.", entry, error)
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
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:
        while chunk := list(islice(pairs, 1024)):
            columns = {name: [getattr(pair, name) for pair in chunk] for name in _SCHEMA.names}
            writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=_SCHEMA))
    if report.bad and bad_rows == "error":
        raise DataError(
            f"{sum(report.bad.values())} rows cannot be used.\n{report}\nCorrect them, or go on without them with "
            "`bad_rows: skip`."
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
