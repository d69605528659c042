"""Sources of preference examples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow, Tie, read_rows, source_key
from lpc_lightning.data.sources.splits import held_out, select_split
from lpc_lightning.types import PreferenceExample


class ExampleSource(Protocol):
    """Source of examples, with a key for caches."""

    def key(self) -> str:
        """Return a text that changes whenever `read` would yield other examples."""
        ...

    def read(self, report: DataReport) -> Iterator[PreferenceExample]:
        """Yield the examples, and count every row in `report`."""
        ...


@dataclass(frozen=True)
class RowSource:
    """Examples from a file, a saved folder or a hub data set (see `read_rows` for the supported formats)."""

    path: str
    """File, folder or hub name."""
    config: str | None = None
    """Configuration of a hub data set."""
    dataset_split: str | None = None
    """Split of a hub data set or a saved folder, such as `train_prefs`. None: `train`."""
    columns: Columns = field(default_factory=Columns)
    """Names of the columns."""
    split: str | None = None
    """Read only rows with this value in the split column. A row without a value counts as `train`. None: all rows."""
    split_column: str = "split"
    """Name of the split column."""
    held_out: bool | None = None
    """True: only held-out prompts. False: only the other prompts. None: all prompts."""
    held_out_share: float = 0.0
    """Share of prompts to hold out, in [0, 1], selected by a hash of the prompt's text."""
    held_out_seed: int = 0
    """Seed of the hash. A different seed holds out different prompts."""

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
            forms: list[str] = []
            try:
                example = to_example(row, place, self.columns, forms)
            except BadRow as fault:
                report.count_bad(place, fault)
                continue
            except Tie:
                report.count_dropped("tie")
                continue
            if self._is_selected(example):
                report.count_selected(forms, example.meta)
                yield example
            else:
                report.held_apart += 1

    def _is_selected(self, example: PreferenceExample) -> bool:
        if self.held_out is None:
            return True
        return self.held_out == held_out(example.prompt, self.held_out_share, self.held_out_seed)


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
        return report.counting(self.examples)
