"""Sources of preference examples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from typing import Protocol

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.locations import DEFAULT_SPLIT, open_location
from lpc_lightning.data.sources.prompts import with_name
from lpc_lightning.data.sources.reading import read_rows
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow, Tie, entry_of, label_text
from lpc_lightning.data.sources.splits import RANKS, HoldOut, first_held_out, held_out, refuse_marked, select_split
from lpc_lightning.files.plain_values import plain
from lpc_lightning.types import PreferenceExample


class ExampleSource(Protocol):
    """Source of examples, with a key for caches."""

    def key(self) -> str:
        """Return a text that changes whenever `read` would yield other examples."""
        ...

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """Yield the examples, and count every row in `report`.

        Also count every example by `DataReport.count_pair`. Otherwise a later command cannot find out whether it reads
        the examples of a run again, and does not use them.
        """
        ...


@dataclass(frozen=True)
class RowSource:
    """Examples from files, a folder or a hub data set (see `read_rows` for the supported formats)."""

    path: str | tuple[str, ...]
    """File, folder, pattern or hub name, or files and patterns."""
    config: str | None = None
    """Configuration of a hub data set."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns, and how their cells are read."""
    split: str | None = None
    """Split to read: one of the path's own splits (hub data sets, folders and JSON files with splits), otherwise a
    value of the split column. A row without a value counts as `train`. None: the own split `train`, otherwise all
    rows."""
    split_column: str = "split"
    """Name of the split column."""
    held_out: bool | None = None
    """True: only held-out prompts or pairs. False: only the others. None: all."""
    held_out_by: HoldOut = "prompt"
    """What a hash selects: prompts with all their pairs, or pairs."""
    held_out_share: float = 0.0
    """Share of prompts or pairs to hold out, in [0, 1]. At least one is held out if there are two or more."""

    def key(self) -> str:
        """See `ExampleSource.key`."""
        settings = plain({name: value for name, value in asdict(self).items() if name != "path"})
        location = open_location(self.path, self.config)
        own = self.split if location.has_splits else None
        splits = [location.has_splits, location.known_splits]
        return json.dumps([location.key(own), splits, settings], sort_keys=True)

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        lowest = None
        if self.held_out is not None:
            ranks = (self._rank(example) for example, _ in self._examples(DataReport()))
            lowest = first_held_out(ranks, self.held_out_share)
        for example, forms in self._examples(report):
            if self._is_selected(example, lowest):
                report.count_pair(example)
                report.count_selected(forms, (name for name in example.meta if name != self.split_column))
                yield with_name(example, self.columns.named_in_prompt)
            else:
                report.held_apart += 1

    def _examples(self, report: DataReport) -> Iterator[tuple[PreferenceExample, list[str]]]:
        """Yield the examples of the split with the names of their special forms."""
        location = open_location(self.path, self.config)
        read = self.split or DEFAULT_SPLIT
        report.name_unread_splits(name for name in location.known_splits if name != read)
        own = self.split if location.has_splits else None
        rows = read_rows(self.path, config=self.config, split=own, on_bad=report.count_unread)
        rows = report.counting(rows)
        if self.split is not None and not location.has_splits:
            rows = select_split(rows, self.split, self.split_column, report.count_other_split)
        if location.has_splits and read == DEFAULT_SPLIT:
            rows = refuse_marked(rows, self.split_column)
        absent = self.columns.expected
        for place, row in rows:
            absent = {setting: name for setting, name in absent.items() if not label_text(entry_of(row, name))}
            forms: list[str] = []
            try:
                yield to_example(row, place, self.columns, forms), forms
            except BadRow as fault:
                report.count_bad(place, fault)
            except Tie:
                report.count_dropped("tie")
        report.absent += [f"{setting}={name!r}" for setting, name in absent.items()]

    def _is_selected(self, example: PreferenceExample, lowest: int | None) -> bool:
        if self.held_out is None:
            return True
        rank = self._rank(example)
        return self.held_out == (held_out(rank, self.held_out_share) or rank == lowest)

    def _rank(self, example: PreferenceExample) -> int:
        return RANKS[self.held_out_by](example)


@dataclass(frozen=True)
class NamedSource:
    """The same examples with another `PreferenceExample.source`."""

    examples: ExampleSource
    name: str
    """The source of every example."""

    def key(self) -> str:
        """See `ExampleSource.key`."""
        return json.dumps([self.examples.key(), self.name])

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        return (replace(example, source=self.name) for example in self.examples.read(report))


@dataclass(frozen=True)
class ChainedSource:
    """The examples of several sources, one source after another."""

    sources: Sequence[ExampleSource]

    def key(self) -> str:
        """See `ExampleSource.key`."""
        return json.dumps([source.key() for source in self.sources])

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        return chain.from_iterable(source.read(report) for source in self.sources)


@dataclass(frozen=True)
class ExamplesInMemory:
    """Examples held in memory, such as generated ones."""

    examples: Sequence[PreferenceExample]
    name: str
    """Text that identifies the content, for example a hash, or the generator's settings and seed."""

    def key(self) -> str:
        """See `ExampleSource.key`."""
        return f"memory {self.name}"

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """See `ExampleSource.read`."""
        for example in report.counting(self.examples):
            report.count_pair(example)
            yield example
