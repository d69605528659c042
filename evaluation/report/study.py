"""Runs sorted into groups that differ in nothing but the seed, and each group against its baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from lpc_lightning.evaluation.report.runs.records import FINISHED, RunRecord
from lpc_lightning.evaluation.report.runs.settings import Value
from lpc_lightning.evaluation.statistics.seeds import Estimate, estimate

ACCURACIES = ("val/rewards/accuracies", "test/rewards/accuracies")
"""What is reported where no metric is asked for."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed."""

    axes: Mapping[str, Value]
    """An axis that does not apply (the codes of no latent) is left out."""
    records: tuple[RunRecord, ...]
    """All of them, the failed and the missing ones too."""

    @cached_property
    def counted(self) -> tuple[RunRecord, ...]:
        """Those whose metrics go into tables. Of several with the same seed, one run made again, the last counts."""
        latest = {each.name if each.seed is None else each.seed: each for each in self.records if each.counted}
        return tuple(latest.values())

    def values(self, metric: str) -> list[tuple[RunRecord, float]]:
        """Each run that has the metric, with a finite value of it."""
        found = [(each, each.metrics.get(metric, math.nan)) for each in self.counted]
        return [(each, value) for each, value in found if math.isfinite(value)]

    def estimate(self, metric: str) -> Estimate | None:
        """The mean over these; None where there are none."""
        values = [value for _, value in self.values(metric)]
        return estimate(values) if values else None


class LeftOut(NamedTuple):
    """A run that is not in a table, or not as one would think, and why."""

    run: str
    status: str
    why: str


@dataclass(frozen=True)
class Study:
    """All groups of a report."""

    axes: Mapping[str, tuple[Value, ...]]
    """The axes in which groups differ, with their values in order."""
    constant: Mapping[str, Value]
    """The other axes."""
    groups: tuple[Group, ...]

    @property
    def records(self) -> list[RunRecord]:
        """All runs, group by group."""
        return [record for group in self.groups for record in group.records]

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics of runs that count."""
        counted = chain.from_iterable(group.counted for group in self.groups)
        return list(dict.fromkeys(name for record in counted for name in record.metrics))

    def label(self, group: Group, *without: str) -> str:
        """A group's name in a plot: `DPO, marginal, noise 0.3`.

        Args:
            group: One of the study's.
            without: Axes that are told elsewhere.
        """
        parts = [_told(axis, group.axes[axis]) for axis in self.axes if axis in group.axes and axis not in without]
        return ", ".join(parts) or "all runs"

    def left_out(self, metrics: Sequence[str]) -> list[LeftOut]:
        """Runs that are in no table, or whose place in it needs a word."""
        return [each for group in self.groups for each in _left_out(group, metrics)]


def _told(axis: str, value: Value) -> str:
    bare = isinstance(value, str) and value not in ("none", "true", "false")
    return str(value) if bare else f"{axis.rpartition('.')[2]} {value}"


def _left_out(group: Group, metrics: Sequence[str]) -> Iterator[LeftOut]:
    for record in group.records:
        if record.status != FINISHED:
            yield LeftOut(record.name, record.status, record.error or "no reason is recorded")
        if record.counted and not any(record is each for each in group.counted):
            yield LeftOut(record.name, "repeated", f"a later run has the same settings and seed {record.seed}")
    for record in group.counted:
        for metric in metrics:
            if metric not in record.metrics:
                yield LeftOut(record.name, "no metric", f"{metric} was never logged")
            elif not math.isfinite(value := record.metrics[metric]):
                yield LeftOut(record.name, "no number", f"{metric} is {value}")


def make_study(records: Sequence[RunRecord], order: Mapping[str, Sequence[Value]] | None = None) -> Study:
    """Sort runs into groups.

    Args:
        records: With their axes.
        order: The values of axes in the order that their maker gave them. Numbers stand by size in any case.
    """
    values: dict[str, list[Value]] = {name: list(given) for name, given in (order or {}).items()}
    for record in records:
        for name, value in record.axes.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    for known in values.values():
        if is_numeric(known):
            known.sort(key=float)
    members: dict[tuple[tuple[str, Value], ...], list[RunRecord]] = {}
    for record in records:
        key = tuple((name, record.axes[name]) for name in values if name in record.axes)
        members.setdefault(key, []).append(record)
    partial = {name for name in values if any(name not in record.axes for record in records)}
    axes = {name: tuple(known) for name, known in values.items() if len(known) > 1 or (known and name in partial)}
    groups = [Group(dict(key), tuple(found)) for key, found in members.items()]
    groups.sort(key=lambda group: tuple(_place(group, name, known) for name, known in axes.items()))
    constant = {name: known[0] for name, known in values.items() if known and name not in axes}
    return Study(axes, constant, tuple(groups))


def is_numeric(values: Sequence[Value]) -> bool:
    """Whether all values of an axis are numbers."""
    return bool(values) and not any(isinstance(value, str) for value in values)


def _place(group: Group, name: str, known: Sequence[Value]) -> int:
    return known.index(group.axes[name]) if name in group.axes else -1
