"""Records of runs and of measurements, independent of the command that wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.report.runs.arguments import PlacedSettings
from lpc_lightning.evaluation.report.runs.inputs import Inputs
from lpc_lightning.evaluation.report.runs.settings import WEIGHTS, Value, as_value, is_without_influence

FINISHED, MISSING, UNKNOWN = "finished", "missing", "unknown"
PRECISION = "precision"
OPTIONAL = (WEIGHTS, PRECISION)
"""Conditions that are compared where they are known: a plain model has no kind of weights."""
SCORED_PAIRS = {
    "callbacks.PreferenceAccuracy.training_pairs": "val/training/",
    "callbacks.PreferenceAccuracy.by": "/(others)",
    "callbacks.PreferenceAccuracy.most": "/(others)",
}
"""Settings that decide which pairs a metric with this part in its name is over. They have no influence on others."""
COUNTED = (FINISHED, UNKNOWN)
"""Statuses of runs whose metrics are in the tables. A run of unknown status is also listed as such."""


@dataclass(frozen=True)
class Curve:
    """A metric over training."""

    steps: tuple[int, ...]
    """Optimizer steps in rising order."""
    values: tuple[float, ...]
    """One finite value for each step."""


@dataclass(frozen=True)
class RunRecord:
    """A run, or a cell of an ablation without a run."""

    name: str
    axes: Mapping[str, Value] = field(default_factory=dict)
    """Settings that distinguish the run from other runs, without the seed."""
    seed: Value | None = None
    """The seed, or the name of a value on the axis `seed`. None: there is none."""
    status: str = FINISHED
    """`finished`, `failed`, `running`, `stopped`, `missing` (never started), or `unknown` (not recorded)."""
    error: str | None = None
    folder: Path | None = None
    """Run folder. None: there is none."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of each metric by its logged name, such as `val/rewards/accuracies`. It may be NaN."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Number of parameters of the `policy` and of the `latent`."""
    seconds: float | None = None
    peak_bytes: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    """All settings by the names of their flags."""
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By metric that was measured after the run: conditions that do not follow from the run's settings."""
    measured: Mapping[str, Path] = field(default_factory=dict)
    """By metric that was measured after the run: the folder of the results."""
    grid: str = ""
    """Folder of the ablation whose cell the run is. Empty: the run is no cell."""
    grid_axes: tuple[str, ...] = ()
    """Axes of the grid, also the axis `seed`. Empty: they are not known."""
    arguments: tuple[PlacedSettings, ...] = ()
    """Arguments of the cell after those of the grid's base, in their order; see `place_arguments`."""
    tuned: Mapping[str, Value] = field(default_factory=dict)
    """Tuned axes of the grid, with the values that were chosen for the run."""
    versions: Mapping[str, Value] = field(default_factory=dict)
    """Git revision, packages and platform under which the run ended; see `provenance`. Empty: not recorded."""
    inputs: Inputs | None = None
    """Files and code of a cell. None: the run is no cell."""

    @property
    def counted(self) -> bool:
        """True if the metrics of the run are in the tables."""
        return self.status in COUNTED

    def argument(self, name: str) -> PlacedSettings | None:
        """Return the argument that sets a setting. None: the base of the grid, a config file or a default does."""
        return next((argument for argument in reversed(self.arguments) if argument.sets(name)), None)


@dataclass(frozen=True)
class Measurement:
    """Metrics of a run's checkpoint that `evaluate`, `validate` or `test` measured after the run."""

    name: str
    metrics: Mapping[str, float]
    run: Path | None
    """Run folder of the checkpoint. None: the model is not a checkpoint of a run."""
    folder: Path
    """Folder of the results."""
    seed: Value | None = None
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By metric: what it was measured on and how."""


@dataclass(frozen=True)
class RunProvenance:
    """The origin of an ablation or of results."""

    name: str
    command: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Versions and the like, as JSON."""


@dataclass(frozen=True)
class GroupTuning:
    """The tuning of an axis for one group of an ablation's cells."""

    ablation: str
    """Name of the ablation's folder."""
    axes: Mapping[str, Value]
    """The group's value on each axis, without seed and tuned axis."""
    axis: str
    """The tuned axis."""
    section: str
    """The section `tune` of the grid, as text. Groups with different ones were not tuned alike."""
    value: Value
    """The chosen value. `none`: no value was chosen."""
    note: str
    """What a reader has to know about the choice."""
    scores: Mapping[Value, Mapping[int, float | None]]
    """By value and tuning seed: the score. None: the cell has none."""
    added: tuple[Value, ...]
    """Values that were added because a best value was at an edge."""
    by: str
    """The metric of the scores."""


@dataclass(frozen=True)
class Loaded:
    """The content of one or several folders."""

    records: tuple[RunRecord, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    origins: tuple[RunProvenance, ...] = ()
    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    """Values of each axis in the order in which the ablations name them."""
    tunings: tuple[GroupTuning, ...] = ()

    def __add__(self, other: Loaded) -> Loaded:
        """Join the contents. Equal origins and values are kept once."""
        axes = {
            name: tuple(dict.fromkeys([*self.axes.get(name, ()), *other.axes.get(name, ())]))
            for name in [*self.axes, *(name for name in other.axes if name not in self.axes)]
        }
        origins = [*self.origins, *(origin for origin in other.origins if origin not in self.origins)]
        return Loaded(
            self.records + other.records,
            self.measurements + other.measurements,
            tuple(origins),
            axes,
            self.tunings + other.tunings,
        )


def join_measurements(
    records: Sequence[RunRecord], measurements: Sequence[Measurement]
) -> tuple[list[RunRecord], list[tuple[str, str, str]]]:
    """Add measured metrics to the records of their runs.

    A measurement without a run becomes a record with the axis `model`.

    Returns:
        The records, and notes with the name of a run, a status and a reason. `repeated`: a metric was measured twice
        with different values. `no run`: the measured run is not among the records.
    """
    joined = list(records)
    indices = {record.folder.resolve(): index for index, record in enumerate(records) if record.folder is not None}
    added: dict[int, dict[str, float]] = {}
    folders: dict[int, dict[str, Path]] = {}
    conditions: dict[int, dict[str, Mapping[str, Any]]] = {}
    notes = []
    for measured in measurements:
        index = None if measured.run is None else indices.get(measured.run.resolve())
        if index is None:
            if measured.run is not None:
                reason = (
                    f"found no run in {measured.run}: {measured.folder} stands in a group of its own. Give the run its "
                    "old place, or measure it again"
                )
                notes.append((measured.name, "no run", reason))
            axes = {"model": as_value(measured.name)}
            record = RunRecord(measured.name, axes, measured.seed, folder=measured.folder, metrics=measured.metrics)
            own_folder = dict.fromkeys(measured.metrics, measured.folder)
            joined.append(replace(record, conditions=measured.conditions, measured=own_folder))
            continue
        metrics = added.setdefault(index, {})
        changed = sorted(name for name, value in measured.metrics.items() if metrics.get(name, value) != value)
        if changed:
            reason = f"{', '.join(changed)}: the value in {measured.folder} counts"
            notes.append((joined[index].name, "repeated", reason))
        metrics |= measured.metrics
        folders.setdefault(index, {}).update(dict.fromkeys(measured.metrics, measured.folder))
        own = records[index].settings
        conditions.setdefault(index, {}).update(
            {
                metric: {name: value for name, value in entries.items() if own.get(name) != value}
                for metric, entries in measured.conditions.items()
            }
        )
    for index, metrics in added.items():
        record = joined[index]
        joined[index] = replace(
            record, metrics={**record.metrics, **metrics}, conditions=conditions[index], measured=folders[index]
        )
    return joined, notes


def check_conditions(records: Sequence[RunRecord], metrics: Sequence[str]) -> None:
    """Check that a metric was measured under the same conditions in all runs.

    Args:
        records: The runs, with the measurements.
        metrics: Metrics to compare.

    Raises:
        ConfigError: Two runs differ in a condition. The error names it.
    """
    for metric in metrics:
        having = [record for record in records if metric in record.metrics and record.counted]
        firsts: dict[str, tuple[RunRecord, Any]] = {}
        of_metric = [name for name, part in SCORED_PAIRS.items() if part in metric]
        names = dict.fromkeys([*of_metric, *(name for record in having for name in record.conditions.get(metric, {}))])
        for name, record in product(names, having):
            is_optional = name in OPTIONAL or name in of_metric
            own = record.settings.get(name) if is_optional else None
            value = record.conditions.get(metric, {}).get(name, own)
            if (name not in of_metric and is_without_influence(name)) or (is_optional and value is None):
                continue
            # The first record that has the condition, if it is optional.
            first, expected = firsts.setdefault(name, (record, value))
            if value != expected:
                raise ConfigError(
                    f"runs: found {metric} measured with {name} {_describe(first, metric, name, expected)} for "
                    f"{first.name} and {_describe(record, metric, name, value)} for {record.name}, expected equal "
                    "conditions. Measure one of them again, or name the other runs one by one."
                )


def _describe(record: RunRecord, metric: str, name: str, value: Any) -> Value:
    is_own = value is None and name not in record.conditions.get(metric, {})
    return "the run's own" if is_own else as_value(value)


def numeric_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Read metrics from JSON. null becomes NaN, and entries that are not numbers are left out."""
    return {
        name: math.nan if value is None else float(value)
        for name, value in metrics.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }
