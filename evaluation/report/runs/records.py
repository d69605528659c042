"""What is known of a run, wherever it comes from, and all the runs in some folders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lpc_lightning.evaluation.report.runs.settings import Value, as_value, differing

FINISHED, MISSING, UNKNOWN = "finished", "missing", "unknown"
COUNTED = (FINISHED, UNKNOWN)
"""What goes into tables: a run of which nothing tells whether it came to its end is counted, and listed."""


@dataclass(frozen=True)
class Curve:
    """A metric over training."""

    steps: tuple[int, ...]
    """Optimizer steps, rising."""
    values: tuple[float, ...]
    """As many, finite."""


@dataclass(frozen=True)
class RunRecord:
    """A run, or a cell of an ablation that has not become one."""

    name: str
    axes: Mapping[str, Value] = field(default_factory=dict)
    """What sets it apart from other runs, without the seed."""
    seed: int | None = None
    status: str = FINISHED
    """`finished`, `failed`, `running`, `stopped`; `missing`, never begun; `unknown`, a folder that does not tell."""
    error: str | None = None
    place: Path | None = None
    """Its run folder, where there is one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last value of each metric, by the names that they are logged by: `val/rewards/accuracies`. May be NaN."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Counts of parameters of the `policy` and of the `latent`."""
    seconds: float | None = None
    peak_bytes: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    """All of them, by the names of their flags."""
    own_axes: bool = True
    """Whether `axes` are given; if not, they are the settings in which such runs differ."""

    @property
    def counted(self) -> bool:
        """Whether its metrics go into tables."""
        return self.status in COUNTED


@dataclass(frozen=True)
class Measured:
    """Metrics of a run's checkpoint, measured after the run: by `evaluate`, `validate` or `test`."""

    name: str
    metrics: Mapping[str, float]
    run: Path | None
    """The run folder of what was measured. None: no checkpoint of a run."""
    place: Path
    seed: int | None = None


@dataclass(frozen=True)
class RunProvenance:
    """How an ablation or a set of results was made."""

    name: str
    command: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Versions and the like, as JSON."""


@dataclass(frozen=True)
class Loaded:
    """What one or several folders hold."""

    records: tuple[RunRecord, ...] = ()
    measured: tuple[Measured, ...] = ()
    makings: tuple[RunProvenance, ...] = ()
    axes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    """The values of axes in the order in which their makers name them."""

    def __add__(self, other: Loaded) -> Loaded:
        """Both."""
        axes = {
            name: tuple(dict.fromkeys([*self.axes.get(name, ()), *other.axes.get(name, ())]))
            for name in [*self.axes, *(name for name in other.axes if name not in self.axes)]
        }
        makings = [*self.makings, *(making for making in other.makings if making not in self.makings)]
        return Loaded(self.records + other.records, self.measured + other.measured, tuple(makings), axes)


def with_axes(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Records that all have axes: runs without get the settings in which they differ from each other."""
    names = differing([record.settings for record in records if not record.own_axes])
    return [
        record
        if record.own_axes
        else replace(record, axes={name: record.settings[name] for name in names if name in record.settings})
        for record in records
    ]


def joined(
    records: Sequence[RunRecord], measured: Sequence[Measured]
) -> tuple[list[RunRecord], list[tuple[str, str, str]]]:
    """Records with what was measured of their checkpoints; what belongs to none is a record with `model` as its axis.

    Returns:
        The records; and of metrics that were measured twice the run, what is the matter, and which value counts.
    """
    found = list(records)
    places = {record.place.resolve(): number for number, record in enumerate(records) if record.place is not None}
    later: dict[int, dict[str, float]] = {}
    notes = []
    for each in measured:
        number = None if each.run is None else places.get(each.run.resolve())
        if number is None:
            axes = {"model": as_value(each.name)}
            found.append(RunRecord(each.name, axes, each.seed, place=each.place, metrics=each.metrics))
            continue
        known = later.setdefault(number, {})
        if twice := sorted(name for name in each.metrics if known.get(name, each.metrics[name]) != each.metrics[name]):
            notes.append((found[number].name, "repeated", f"{', '.join(twice)}: the value in {each.place} counts"))
        known |= each.metrics
    for number, metrics in later.items():
        found[number] = replace(found[number], metrics={**found[number].metrics, **metrics})
    return found, notes


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics out of JSON: a number that is none (null) is NaN, and what is no number at all is left out."""
    return {
        name: math.nan if value is None else float(value)
        for name, value in metrics.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def split_seed(axes: Mapping[str, Any]) -> tuple[dict[str, Value], int | None]:
    """Axes without the seed among them, and the seed."""
    values = {name: as_value(value) for name, value in axes.items()}
    seed = values.pop("seed", None)
    return values, seed if isinstance(seed, int) else None
