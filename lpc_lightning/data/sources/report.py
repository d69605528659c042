"""Counts of all rows of a data set. Every row is counted, including the rows that are not used."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.types import PreferenceExample

T = TypeVar("T")

PLACES = 3
"""Number of places that are stored for each reason."""

MOST_COLUMNS = 12
"""Number of unused columns that are listed."""


@dataclass
class DataReport:
    """Counts of rows, from the reader to the tokens. `read = kept + other splits + held apart + bad + dropped`."""

    read: int = 0
    """Number of rows, including unreadable lines."""
    kept: int = 0
    """Number of tokenized pairs, including cut pairs."""
    other_splits: dict[str, int] = field(default_factory=dict)
    """Number of rows in other splits, by the value of their split column."""
    unread_splits: list[str] = field(default_factory=list)
    """Names of the data set's own splits that were not read. Their rows are not counted."""
    held_apart: int = 0
    """Number of rows on the other side of a hold-out by prompt."""
    bad: dict[str, int] = field(default_factory=dict)
    """Number of rows that cannot be used, by reason."""
    bad_places: dict[str, list[str]] = field(default_factory=dict)
    """Places and details of the first three bad rows, by reason."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of valid pairs dropped because of a tie or by the length policy, by reason."""
    cut: dict[str, int] = field(default_factory=dict)
    """Number of kept pairs that the length policy shortened, by the part that was cut."""
    changed: dict[str, int] = field(default_factory=dict)
    """Number of kept pairs whose text the template changed, by the change."""
    forms: dict[str, int] = field(default_factory=dict)
    """Number of selected pairs that were read from a special form, by form."""
    meta: dict[str, int] = field(default_factory=dict)
    """Number of selected pairs with a column that has no purpose, by column."""
    absent: list[str] = field(default_factory=list)
    """Settings of `Columns` with the name of a column in which no row has a value."""
    selected: int = 0
    """Number of selected pairs, before the length policy drops any. 0 for a source that does not count them."""
    content: int = 0
    """Sum of the hashes of the selected pairs. It does not depend on their order."""

    @property
    def rows(self) -> dict[str, int | str]:
        """Number and digest of the selected pairs, which differ if other pairs were read. See `count_pair`."""
        return {"pairs": self.selected, "digest": f"{self.content:064x}"}

    def counting(self, rows: Iterable[T]) -> Iterator[T]:
        """Yield the same rows, and count each as read."""
        for row in rows:
            self.read += 1
            yield row

    def count_bad(self, place: str, fault: BadRow) -> None:
        """Count one row that cannot be used."""
        self.bad[fault.reason] = self.bad.get(fault.reason, 0) + 1
        places = self.bad_places.setdefault(fault.reason, [])
        if len(places) < PLACES:
            places.append(f"{place} ({fault.detail})")

    def count_unread(self, place: str, fault: BadRow) -> None:
        """Count one line that cannot be parsed. It is a callback for `read_rows(on_bad=...)`."""
        self.read += 1
        self.count_bad(place, fault)

    def count_other_split(self, split: str) -> None:
        """Count one row that belongs to another split."""
        self.other_splits[split] = self.other_splits.get(split, 0) + 1

    def name_unread_splits(self, names: Iterable[str]) -> None:
        """Name the data set's own splits that are not read."""
        self.unread_splits += [name for name in names if name not in self.unread_splits]

    def count_dropped(self, reason: str) -> None:
        """Count one pair dropped because of a tie or by the length policy."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def count_cut(self, part: str) -> None:
        """Count one pair that the length policy shortened."""
        self.cut[part] = self.cut.get(part, 0) + 1

    def count_changed(self, change: str) -> None:
        """Count one kept pair whose text the template changed."""
        self.changed[change] = self.changed.get(change, 0) + 1

    def count_pair(self, example: PreferenceExample) -> None:
        """Count one selected pair with its texts, its label, its factor and its annotator, as in the data."""
        content = [example.prompt, example.chosen, example.rejected, example.factor, example.annotator]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
        self.selected += 1
        self.content = (self.content + int.from_bytes(digest, "big")) % 2**256

    def count_selected(self, forms: Iterable[str], meta: Iterable[str]) -> None:
        """Count one selected pair with its special forms and its columns without a purpose."""
        for counts, names in ((self.forms, forms), (self.meta, meta)):
            for name in names:
                counts[name] = counts.get(name, 0) + 1

    def merged(self, other: DataReport) -> DataReport:
        """Return a new report with the counts of both reports added."""
        places = {reason: list(entries) for reason, entries in self.bad_places.items()}
        for reason, entries in other.bad_places.items():
            places[reason] = (places.get(reason, []) + entries)[:PLACES]
        return DataReport(
            read=self.read + other.read,
            kept=self.kept + other.kept,
            other_splits=_sum(self.other_splits, other.other_splits),
            unread_splits=list(dict.fromkeys([*self.unread_splits, *other.unread_splits])),
            held_apart=self.held_apart + other.held_apart,
            bad=_sum(self.bad, other.bad),
            bad_places=places,
            dropped=_sum(self.dropped, other.dropped),
            cut=_sum(self.cut, other.cut),
            changed=_sum(self.changed, other.changed),
            forms=_sum(self.forms, other.forms),
            meta=_sum(self.meta, other.meta),
            absent=list(dict.fromkeys([*self.absent, *other.absent])),
            selected=self.selected + other.selected,
            content=(self.content + other.content) % 2**256,
        )

    def metrics(self) -> dict[str, float]:
        """Return the counts by metric name: `data/read`, `data/kept`, `data/bad/empty_answer`, `data/dropped/...`.

        Counts of splits or forms whose names differ in punctuation or case alone are one metric, their sum.
        """
        named = {"read": self.read, "kept": self.kept, "held_apart": self.held_apart}
        groups = {
            "other_splits": self.other_splits,
            "bad": self.bad,
            "dropped": self.dropped,
            "cut": self.cut,
            "changed": self.changed,
            "forms": self.forms,
        }
        for group, counts in groups.items():
            for reason, count in counts.items():
                name = f"{group}/{_slug(reason)}"
                named[name] = named.get(name, 0) + count
        return {f"data/{name}": float(count) for name, count in named.items()}

    def describe(self) -> str:
        """Return a short text for the log: one line of totals, then one line for each reason."""
        lines = [f"{self.read} rows read, {self.kept} pairs kept"]
        lines += [f"  {n} left to split {split!r}" for split, n in self.other_splits.items()]
        lines += [f"  splits that are not read here: {', '.join(self.unread_splits)}"] if self.unread_splits else []
        lines += [f"  {self.held_apart} on the other side of the hold-out"] if self.held_apart else []
        for reason, n in self.bad.items():
            places = self.bad_places.get(reason, [])
            more = "; ..." if n > len(places) else ""
            lines.append(f"  {n} bad: {reason}: {'; '.join(places)}{more}")
        lines += [f"  {n} dropped: {reason}" for reason, n in self.dropped.items()]
        lines += [f"  {n} kept with a cut {part}" for part, n in self.cut.items()]
        lines += [f"  {n} kept with a change: {change}" for change, n in self.changed.items()]
        lines += [f"  {n} read from a special form: {form}" for form, n in self.forms.items()]
        shown = list(self.meta)[:MOST_COLUMNS] + (["..."] if len(self.meta) > MOST_COLUMNS else [])
        lines += [f"  columns that are in no text: {', '.join(shown)}"] if shown else []
        lines += [f"  set as columns, without a value in any row: {', '.join(self.absent)}"] if self.absent else []
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self), ensure_ascii=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> DataReport:
        """Parse a report written by `to_json`.

        Raises:
            ValueError: The text is not such an object.
        """
        values: Any = json.loads(text)
        expected = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != expected:
            raise ValueError(f"not a data report: expected an object with {sorted(expected)}, found {text[:80]!r}")
        return cls(**values)


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {reason: one.get(reason, 0) + other.get(reason, 0) for reason in [*one, *(set(other) - set(one))]}


def _slug(reason: str) -> str:
    return re.sub(r"\W+", "_", reason).strip("_").lower() or "_"
