"""Differences between the settings of runs that need no column: the axes or the classes of the runs explain them."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from lpc_lightning.evaluation.report.runs.arguments import PlacedSettings
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.runs.settings import Value, as_value

PACKAGES = ("algorithms", "robust", "latent", "data", "policy", "callbacks")
"""Packages whose classes have settings with defaults."""


def is_explained(name: str, values: Sequence[Value | None], records: Sequence[RunRecord]) -> bool:
    """Return true if the runs have different values of a setting because of their own values on the axes.

    1. The arguments of a run's own value on an axis set the setting, or its value on the tuned axis. It does not
       count what other values of the axis set, nor what a change on the command line sets after it.
    2. The other runs have one value, and no change on the command line has set it. It is the value of their grids'
       bases, beside which the grids declare the axes.
    3. All grids have the axes, and runs with equal values on them have the same value of the setting.

    So two epochs of an arm that sets them are compared with one epoch of an arm that does not, but three epochs from
    the command line with neither.

    Args:
        name: The setting.
        values: Its value in each run. None: the run has another class, without this argument.
        records: The runs.
    """
    runs = [(record, value) for record, value in zip(records, values, strict=True) if value is not None]
    if len({value for _, value in runs}) < 2:
        return True
    is_one_grid = len({record.grid for record, _ in runs}) == 1
    axes, of_base = set[str](), set[Value]()
    for record, value in runs:
        argument = _argument(name, value, record, is_one_grid)
        if argument is None:
            of_base.add(value)
        elif argument.place == "change":
            return False
        else:
            axes.update(argument.axes)
    if not axes or len(of_base) > 1 or any(not axes.issubset(record.grid_axes) for record, _ in runs):
        return False
    return is_function((_point(record, sorted(axes)), value) for record, value in runs)


def _argument(name: str, value: Value, record: RunRecord, is_one_grid: bool) -> PlacedSettings | None:
    """Return the argument that sets a setting of a run, or the class of which it is a setting. None: there is none.

    A class sets its arguments to its own defaults. Other values of two grids may be those of their bases.
    """
    argument, owner = record.argument(name), owner_of(name, record)
    if argument is not None or owner is None:
        return argument
    of_class = record.argument(owner)
    is_own = is_one_grid or _default(str(record.settings[owner]), name[len(owner) + 1 :]) == value
    return of_class if is_own or (of_class is not None and of_class.place == "change") else None


def _point(record: RunRecord, axes: Sequence[str]) -> Hashable:
    return tuple(record.seed if axis == "seed" else record.axes.get(axis) for axis in axes)


def is_function(pairs: Iterable[tuple[Hashable, Hashable]]) -> bool:
    """Return true if equal first entries have equal second entries."""
    seen: dict[Hashable, Hashable] = {}
    return all(seen.setdefault(key, value) == value for key, value in pairs)


def owner_of(name: str, record: RunRecord) -> str | None:
    """Return the setting that is the class of which the named setting is an argument. None: it is no argument."""
    parts = name.split(".")
    parents = (".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((parent for parent in parents if parent in record.settings), None)


def is_default(name: str, values: Sequence[Value | None], records: Sequence[RunRecord]) -> bool:
    """Return true if the runs have different classes, each with its own default of this argument."""
    runs = [(record, value) for record, value in zip(records, values, strict=True) if value is not None]
    owners = {owner_of(name, record) for record, _ in runs}
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
