"""The settings in which runs differ beyond their axes, so that no report compares unlike runs as if they were alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

from lpc_lightning.evaluation.report.runs.explained import is_default, is_explained, is_function, owner_of
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.runs.settings import SEED, Value, is_without_influence

BY_SEED = "by seed"
"""Value of a seed that changes with the run's seed."""
BY_TUNING = "tuned"
"""Value of a setting that was tuned for each combination of the axes."""


def add_axes(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Add to the axes of runs every setting in which the runs differ and that the axes do not explain.

    What the axes explain is in `is_explained`: settings of an arm, but no setting in which the bases of two grids
    differ, or that the command line has changed for one of the runs.

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
        if not is_explained(name, values, known):
            values = _mark_seeds(name, values, known)
            if len({value for value in values if value is not None}) > 1 and not is_default(name, values, known):
                added[name] = values
    added = _mark_tuned(added, known)
    return [_with_axes(record, known, added) for record in records]


def _without_shared_axes(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Leave out each axis that does not tell runs with it from runs without it."""
    known, left_out = [record for record in records if record.settings], set[str]()
    settings = {name for record in known for name in record.settings}
    for axis in {axis for record in records for axis in record.axes}:
        having = [record for record in records if axis in record.axes]
        cells = [record for record in having if axis in record.grid_axes and record.settings]
        if not cells or len(having) == len(records) or len({record.axes[axis] for record in having}) > 1:
            continue
        names = [name for name in settings if any(_is_set_by(axis, name, record) for record in cells)]
        if all(len({record.settings.get(name) for record in known}) == 1 for name in names):
            left_out.add(axis)
    return [_without_axes(record, left_out) for record in records]


def _is_set_by(axis: str, name: str, record: RunRecord) -> bool:
    """Return true if the run's value on an axis sets a setting. A tuned value is no axis's own."""
    argument = record.argument(name)
    return argument is not None and argument.place == "axis" and axis in argument.axes


def _without_axes(record: RunRecord, left_out: Set[str]) -> RunRecord:
    """Return a record without some axes. What they set is in the bases of the other grids, with the same value."""
    arguments = (
        replace(argument, axes=tuple(axis for axis in argument.axes if axis not in left_out))
        for argument in record.arguments
        if argument.place != "axis" or not left_out & set(argument.axes)
    )
    return replace(
        record,
        axes={axis: value for axis, value in record.axes.items() if axis not in left_out},
        grid_axes=tuple(axis for axis in record.grid_axes if axis not in left_out),
        arguments=tuple(arguments),
    )


def _values(name: str, records: Sequence[RunRecord]) -> list[Value | None]:
    """Return the setting of each run. `none`: it is not set. None: the run has another class, without this argument."""
    having = [record for record in records if name in record.settings]
    owner = owner_of(name, having[0])
    classes = {record.settings.get(owner) for record in having} if owner else set()
    return [
        None
        if name not in record.settings and owner and record.settings.get(owner) not in classes
        else record.settings.get(name, "none")
        for record in records
    ]


def _mark_seeds(name: str, values: Sequence[Value | None], records: Sequence[RunRecord]) -> list[Value | None]:
    """Return the values of a setting. If it is a seed that changes with the run's seed, its value is `BY_SEED`."""
    if not name.endswith("seed"):
        return list(values)
    runs = list(zip(records, values, strict=True))
    marked = list(values)
    for grid in {record.grid for record in records}:
        members = [(record.settings.get(SEED), value) for record, value in runs if record.grid == grid]
        if len({value for _, value in members}) > 1 and is_function(members):
            marked = [
                BY_SEED if record.grid == grid and value is not None else value
                for record, value in zip(records, marked, strict=True)
            ]
    return marked


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
        if any(chosen[name]) and is_function((point, value) for point, value, is_chosen in runs if is_chosen):
            marked[name] = [BY_TUNING if is_chosen else value for _, value, is_chosen in runs]
    return {
        name: values for name, values in marked.items() if len({value for value in values if value is not None}) > 1
    }


def _is_chosen(name: str, value: Value | None, record: RunRecord) -> bool:
    """Return true if tuning has chosen the value of a setting for a run."""
    argument = record.argument(name)
    is_tuned = record.settings.get("tune", "none") != "none" and value in record.tuned.values()
    return is_tuned and argument is not None and argument.place == "tuning"


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
