"""The settings in which runs differ beyond their axes, so that no report compares unlike runs as if they were alike."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.runs.settings import SEED, Value, as_value, is_without_influence

BY_SEED = "by seed"
"""Value of a seed that changes with the run's seed."""
BY_TUNING = "tuned"
"""Value of a setting that was tuned for each combination of the axes."""
PACKAGES = ("algorithms", "robust", "latent", "data", "policy", "callbacks")
"""Packages whose classes have settings with defaults."""


def add_axes(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Add to the axes of runs every setting in which the runs differ and that the axes do not explain.

    Axes explain a setting if the grids of all runs set it by these axes, and runs with equal values on them agree in
    it. So the settings of an arm are explained. A setting of the base in which two grids differ is not.

    Left out are settings that cannot change a result (see `is_without_influence`), the run's seed, other seeds that
    change with it, arguments that only one class has, and arguments with the defaults of different classes. Values
    that tuning has chosen are no difference, unless runs that agree in everything else differ in them.

    An axis that some grids have with a single value is left out if the runs of the others have its settings, too. So a
    grid with the axis `algorithm` at `dpo` is compared with one that has DPO in its base.

    Args:
        records: Runs with their settings, and with the axes of their grids. A run of `fit` has no axes.
    """
    records = _without_shared_axes(records)
    known = [record for record in records if record.settings]
    names = list(dict.fromkeys(name for record in known for name in record.settings))
    added: dict[str, list[Value | None]] = {}
    for name in names:
        if name == SEED or is_without_influence(name):
            continue
        values = _values(name, known)
        if not _is_explained(name, values, known):
            values = _mark_seeds(name, values, known)
            if len({value for value in values if value is not None}) > 1 and not _is_default(name, values, known):
                added[name] = values
    added = _mark_tuned(added, known)
    return [_with_axes(record, known, added) for record in records]


def _without_shared_axes(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Leave out each axis that does not tell runs with it from runs without it."""
    known, left_out = [record for record in records if record.settings], set[str]()
    settings = {name for record in known for name in record.settings}
    for axis in {axis for record in records for axis in record.axes}:
        having = [record for record in records if axis in record.axes]
        grids = {record.grid: record for record in having if axis in record.controls}
        if not grids or len(having) == len(records) or len({record.axes[axis] for record in having}) > 1:
            continue
        names = [name for name in settings if _is_set_by(axis, name, grids.values())]
        if all(len({record.settings.get(name) for record in known}) == 1 for name in names):
            left_out.add(axis)
    return [
        replace(
            record,
            axes={axis: value for axis, value in record.axes.items() if axis not in left_out},
            controls={axis: settings for axis, settings in record.controls.items() if axis not in left_out},
        )
        for record in records
    ]


def _is_set_by(axis: str, name: str, records: Iterable[RunRecord]) -> bool:
    """Return true if an axis sets a setting, and no other axis does. Several axes set one that is tuned."""
    return any(
        _matches([name], record.controls[axis])
        and not any(_matches([name], other) for each, other in record.controls.items() if each != axis)
        for record in records
    )


def _values(name: str, records: Sequence[RunRecord]) -> list[Value | None]:
    """Return the setting of each run. `none`: it is not set. None: the run has another class, without this argument."""
    having = [record for record in records if name in record.settings]
    owner = _owner(name, having[0])
    classes = {record.settings.get(owner) for record in having} if owner else set()
    return [
        None
        if name not in record.settings and owner and record.settings.get(owner) not in classes
        else record.settings.get(name, "none")
        for record in records
    ]


def _owner(name: str, record: RunRecord) -> str | None:
    """Return the setting that is the class of which the named setting is an argument. None: it is no argument."""
    parts = name.split(".")
    parents = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((parent for parent in parents if parent in record.settings), None)


def _is_explained(name: str, values: Sequence[Value | None], records: Sequence[RunRecord]) -> bool:
    """Return true if the axes explain a setting (see `add_axes`)."""
    runs = [(record, value) for record, value in zip(records, values, strict=True) if value is not None]
    if len({value for _, value in runs}) < 2:
        return True
    names = {name}
    if len({record.grid for record, _ in runs}) == 1:
        # The class sets its arguments. Two grids may differ in them for another reason.
        names |= {owner for record, _ in runs if (owner := _owner(name, record))}
    axes = sorted(
        {axis for record, _ in runs for axis, controls in record.controls.items() if _matches(names, controls)}
    )
    if not axes or any(axis not in record.controls for record, _ in runs for axis in axes):
        return False
    return _is_function((_point(record, axes), value) for record, value in runs)


def _matches(names: Iterable[str], controls: Iterable[str]) -> bool:
    """Return true if a setting is among `controls`. `latent.*` means the setting `latent` and everything below it."""
    return any(
        f"{name}.".startswith(control.removesuffix("*")) if control.endswith(".*") else name == control
        for name in names
        for control in controls
    )


def _point(record: RunRecord, axes: Sequence[str]) -> Hashable:
    return tuple(record.seed if axis == "seed" else record.axes.get(axis) for axis in axes)


def _is_function(pairs: Iterable[tuple[Hashable, Hashable]]) -> bool:
    """Return true if equal first entries have equal second entries."""
    seen: dict[Hashable, Hashable] = {}
    return all(seen.setdefault(key, value) == value for key, value in pairs)


def _mark_seeds(name: str, values: Sequence[Value | None], records: Sequence[RunRecord]) -> list[Value | None]:
    """Return the values of a setting. If it is a seed that changes with the run's seed, its value is `BY_SEED`."""
    if not name.endswith("seed"):
        return list(values)
    runs = list(zip(records, values, strict=True))
    marked = list(values)
    for grid in {record.grid for record in records}:
        members = [(record.settings.get(SEED), value) for record, value in runs if record.grid == grid]
        if len({value for _, value in members}) > 1 and _is_function(members):
            marked = [
                BY_SEED if record.grid == grid and value is not None else value
                for record, value in zip(records, marked, strict=True)
            ]
    return marked


def _is_default(name: str, values: Sequence[Value | None], records: Sequence[RunRecord]) -> bool:
    """Return true if the runs have different classes, each with its own default of this argument."""
    runs = [(record, value) for record, value in zip(records, values, strict=True) if value is not None]
    owners = {_owner(name, record) for record, _ in runs}
    owner = owners.pop() if len(owners) == 1 else None
    if owner is None:
        return False
    argument = name[len(owner) + 1 :]
    classes = {str(record.settings[owner]) for record, _ in runs}
    return len(classes) > 1 and all(_default(str(record.settings[owner]), argument) == value for record, value in runs)


@cache
def _default(class_name: str, argument: str) -> Value | None:
    """Return the default of an argument of one of the project's classes. None: it is not known, or there is none."""
    modules = [import_module(f"lpc_lightning.{package}") for package in PACKAGES]
    its_class: Any = next((getattr(module, class_name) for module in modules if hasattr(module, class_name)), None)
    for each in getattr(its_class, "__mro__", ()):
        parameters = inspect.signature(each.__init__).parameters
        if argument in parameters:
            default = parameters[argument].default
            return None if default is inspect.Parameter.empty else as_value(default)
    return None


def _mark_tuned(added: Mapping[str, list[Value | None]], records: Sequence[RunRecord]) -> dict[str, list[Value | None]]:
    """Return added settings. The value that tuning has chosen for a run becomes `BY_TUNING`.

    A setting that then has a single value is left out. If runs that agree in everything else have different chosen
    values, the values stay.
    """
    chosen = {
        name: [_is_chosen(name, *run) for run in zip(values, records, strict=True)] for name, values in added.items()
    }
    others = [values for name, values in added.items() if not any(chosen[name])]
    points = [(*sorted(record.axes.items()), *each) for record, *each in zip(records, *others, strict=True)]
    marked = dict(added)
    for name, values in added.items():
        runs = list(zip(points, values, chosen[name], strict=True))
        if any(chosen[name]) and _is_function((point, value) for point, value, is_chosen in runs if is_chosen):
            marked[name] = [BY_TUNING if is_chosen else value for _, value, is_chosen in runs]
    return {
        name: values for name, values in marked.items() if len({value for value in values if value is not None}) > 1
    }


def _is_chosen(name: str, value: Value | None, record: RunRecord) -> bool:
    """Return true if tuning has chosen the value of a setting for a run.

    All axes of a tuned grid but `seed` control the setting, because a value is chosen for each of their combinations.
    """
    controls = [controls for axis, controls in record.controls.items() if axis != "seed"]
    is_tuned = record.settings.get("tune", "none") != "none" and value in record.tuned.values()
    return is_tuned and all(_matches([name], each) for each in controls)


def _with_axes(record: RunRecord, known: Sequence[RunRecord], added: Mapping[str, Sequence[Value | None]]) -> RunRecord:
    """Return a record with more axes. A run without settings, such as a missing one, has those that its grid shares."""
    axes = dict(record.axes)
    for name, values in added.items():
        if record.settings:
            value = next(value for other, value in zip(known, values, strict=True) if other is record)
        else:
            grid = {value for other, value in zip(known, values, strict=True) if other.grid == record.grid}
            value = grid.pop() if record.grid and len(grid) == 1 else None
        if value is not None:
            axes[f"setting.{name}" if name in record.axes else name] = value
    return replace(record, axes=axes)
