"""Groups of runs that differ only in the seed."""

from __future__ import annotations

import math
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from lpc_lightning.clustered_means import ClusterScores
from lpc_lightning.evaluation.adaptation.pairs import SHARE
from lpc_lightning.evaluation.report.runs.pairs import PromptScores, prompt_scores
from lpc_lightning.evaluation.report.runs.records import FINISHED, RunRecord
from lpc_lightning.evaluation.report.runs.settings import Value
from lpc_lightning.evaluation.statistics.seeds import MIN_PROMPTS, NOT_ON_RECORD, Estimate, Shared, estimate
from lpc_lightning.evaluation.statistics.shared_clusters import shared_variance, with_annotators

ACCURACIES = ("val/rewards/accuracies", "test/rewards/accuracies")
"""Default metrics: the first of these that a run has logged."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed."""

    axes: Mapping[str, Value]
    """Value of each axis. An axis that does not apply is left out, such as the number of codes without a latent."""
    records: tuple[RunRecord, ...]
    """All runs of the group, including failed and missing ones."""

    @cached_property
    def counted(self) -> tuple[RunRecord, ...]:
        """Runs whose metrics are in the tables. Of several runs with the same seed, only the last finished one."""
        ordered = sorted(self.records, key=lambda record: record.status == FINISHED)
        latest = {seed_or_folder(record): record for record in ordered if record.counted}
        return tuple(record for record in self.records if any(record is each for each in latest.values()))

    def values(self, metric: str) -> list[tuple[RunRecord, float]]:
        """Return the runs that have a finite value of the metric, with the value."""
        values = [(record, record.metrics.get(metric, math.nan)) for record in self.counted]
        return [(record, value) for record, value in values if math.isfinite(value)]

    def estimate(self, metric: str) -> Estimate | None:
        """Estimate the mean of the metric over runs. None: no run has a finite value."""
        values = self.values(metric)
        if not values:
            return None
        by_prompt = [prompt_scores(record, metric) for record, _ in values]
        return estimate([value for _, value in values], shared_by(by_prompt))


def seed_or_folder(record: RunRecord) -> str:
    """Return what identifies a run in its group: its seed, or its folder if the seed is not known."""
    return f"none ({record.folder or record.name})" if record.seed is None else str(record.seed)


def shared_by(seeds: Sequence[PromptScores]) -> Shared:
    """Estimate the variance that seeds share.

    Without what each prompt adds to every seed it is known only if seeds have prompts of their own, or too few of them.
    """
    known = [seed.added for seed in seeds if seed.added is not None]
    if len(known) == len(seeds):
        by_prompt = _shared_of([added.prompts for added in known])
        annotators = [added.annotators for added in known if added.annotators is not None]
        both = [added.both for added in known if added.both is not None]
        is_known = len(annotators) == len(both) == len(seeds)
        return with_annotators(by_prompt, _shared_of(annotators), _shared_of(both)) if is_known else by_prompt
    prompts = [seed.prompts for seed in seeds if seed.prompts is not None]
    if len(prompts) < len(seeds):
        return NOT_ON_RECORD
    # Zeros in place of what the prompts add: only the number of shared prompts is right.
    shared = shared_variance([dict.fromkeys(each, 0.0) for each in prompts])
    return NOT_ON_RECORD if shared.prompts and shared.variance is not None else shared


def _shared_of(seeds: Sequence[ClusterScores]) -> Shared:
    # Seeds with the same pairs agree in the shares.
    sizes = dict(ChainMap(*(dict(seed.shares) for seed in seeds)))
    return shared_variance([seed.deviations for seed in seeds], sizes)


class LeftOut(NamedTuple):
    """A run that is missing in a table, or whose use needs an explanation."""

    run: str
    status: str
    why: str


@dataclass(frozen=True)
class Study:
    """All groups of a report."""

    axes: Mapping[str, tuple[Value, ...]]
    """Axes in which groups differ, with their values in order."""
    constant: Mapping[str, Value]
    """Axes with the same value in all groups."""
    groups: tuple[Group, ...]

    @property
    def records(self) -> list[RunRecord]:
        """All runs, group by group."""
        return [record for group in self.groups for record in group.records]

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics of the counted runs."""
        counted = chain.from_iterable(group.counted for group in self.groups)
        return list(dict.fromkeys(name for record in counted for name in record.metrics))

    def label(self, group: Group, *without: str) -> str:
        """Return the name of a group in a plot, such as `DPO, marginal, noise 0.3`.

        Args:
            group: A group of this study.
            without: Axes to leave out, because the plot shows them elsewhere.
        """
        parts = [
            _format_value(axis, group.axes[axis]) for axis in self.axes if axis in group.axes and axis not in without
        ]
        return ", ".join(parts) or "all runs"

    def left_out(self, metrics: Sequence[str]) -> list[LeftOut]:
        """List the runs that are missing in tables, or whose use needs an explanation."""
        return [
            entry
            for group in self.groups
            for entry in (
                *_left_out(group, metrics),
                *_without_interval(self.label(group), group, metrics),
                *_of_fewer_pairs(self.label(group), group, metrics),
            )
        ]


def _format_value(axis: str, value: Value) -> str:
    is_name = isinstance(value, str) and value not in ("none", "true", "false")
    return str(value) if is_name else f"{axis.rpartition('.')[2]} {value}"


def _left_out(group: Group, metrics: Sequence[str]) -> Iterator[LeftOut]:
    for record in group.records:
        if record.status != FINISHED:
            yield LeftOut(record.name, record.status, record.error or "no reason is recorded")
        if record.counted and not any(record is counted for counted in group.counted):
            kind = "later" if record.status == FINISHED else "finished or later"
            yield LeftOut(record.name, "repeated", f"a {kind} run has the same settings and seed {record.seed}")
    for record in group.counted:
        for metric in metrics:
            if metric not in record.metrics:
                yield LeftOut(record.name, "no metric", f"{metric} was never logged")
            elif not math.isfinite(value := record.metrics[metric]):
                yield LeftOut(record.name, "no number", f"{metric} is {value}")


def _without_interval(label: str, group: Group, metrics: Sequence[str]) -> Iterator[LeftOut]:
    for metric in metrics:
        mean = group.estimate(metric)
        if mean is not None and mean.prompts and mean.low is None:
            count = "one prompt" if mean.prompts == 1 else f"{mean.prompts} prompts"
            if mean.prompts < MIN_PROMPTS:
                why = f"all pairs have {count}; an interval needs {MIN_PROMPTS}"
            else:
                why = f"one of {count} has most of the pairs; an interval needs pairs of more prompts"
            yield LeftOut(label, "no interval", f"{metric}: {why}")
        elif mean is not None and mean.prompts and not mean.annotators and "/adaptation/" in metric:
            few = f"fewer than {MIN_PROMPTS} annotators, or what each of them adds is not on record"
            reason = f"{metric}: {few}; the interval is over prompts alone"
            yield LeftOut(label, "prompts alone", reason)
        elif mean is not None and mean.over_seeds_alone and mean.n > 1:
            reason = f"{metric}: what each test prompt adds is not on record; the interval is over seeds alone"
            yield LeftOut(label, "no test", reason)


def _of_fewer_pairs(label: str, group: Group, metrics: Sequence[str]) -> Iterator[LeftOut]:
    for metric in metrics:
        if (found := re.fullmatch(r"(val|test)/adaptation/[^/]+/(\d+)", metric)) is None:
            continue
        stage, n = found.groups()
        share = group.estimate(f"{stage}/adaptation/{SHARE}/{n}")
        if share is not None and share.mean < 1:
            reason = f"{metric}: {share.mean:.2f} of the pairs; annotators with fewer than {n} labels are left out"
            yield LeftOut(label, "fewer pairs", reason)


def make_study(records: Sequence[RunRecord], order: Mapping[str, Sequence[Value]] | None = None) -> Study:
    """Sort runs into groups.

    Args:
        records: Runs with their axes.
        order: Values of axes in the order in which the ablation names them. Numbers are always sorted by size.
    """
    known = {name for record in records for name in record.axes}
    values: dict[str, list[Value]] = {name: list(ordered) for name, ordered in (order or {}).items() if name in known}
    for record in records:
        for name, value in record.axes.items():
            axis_values = values.setdefault(name, [])
            if value not in axis_values:
                axis_values.append(value)
    for axis_values in values.values():
        if is_numeric(axis_values):
            axis_values.sort(key=float)
    members: dict[tuple[tuple[str, Value], ...], list[RunRecord]] = {}
    for record in records:
        key = tuple((name, record.axes[name]) for name in values if name in record.axes)
        members.setdefault(key, []).append(record)
    partial = {name for name in values if any(name not in record.axes for record in records)}
    axes = {
        name: tuple(axis_values)
        for name, axis_values in values.items()
        if len(axis_values) > 1 or (axis_values and name in partial)
    }
    groups = [Group(dict(key), tuple(group_records)) for key, group_records in members.items()]
    groups.sort(key=lambda group: tuple(_rank(group, name, axis_values) for name, axis_values in axes.items()))
    constant = {name: axis_values[0] for name, axis_values in values.items() if axis_values and name not in axes}
    return Study(axes, constant, tuple(groups))


def is_numeric(values: Sequence[Value]) -> bool:
    """Return true if there are values and all of them are numbers."""
    return bool(values) and not any(isinstance(value, str) for value in values)


def _rank(group: Group, axis: str, values: Sequence[Value]) -> int:
    """Return the position of a group's value on an axis. -1: the axis does not apply."""
    return values.index(group.axes[axis]) if axis in group.axes else -1
