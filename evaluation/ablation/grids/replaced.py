"""Arguments that a later argument of the same cell replaces.

If an axis has the earlier one, the cell would run at the later value, under the name of the axis's value. If `base` has
it, and a config file of an axis replaces it, the grid states a value at which no cell runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lpc_lightning.evaluation.ablation.grids.axes import parse_value, setting_name
from lpc_lightning.files.yaml_files import SUFFIXES, read_yaml

BASE, CHANGE, TUNED = "base", "change", "tune.axis"
"""Places of arguments: the base of the grid, the command line, and the value chosen on the tuned axis."""


class PlacedArgument(NamedTuple):
    """An argument of a cell, with its place in the grid."""

    argument: str
    place: str
    """Key of the grid file, such as `axes.seed`, or one of the places above."""
    axis: str | None = None
    """Name of the axis that has the argument. None: another place."""


class _Settings(NamedTuple):
    """What an argument sets."""

    name: str
    """Name of the setting, "" for those of a config file without a name."""
    below: frozenset[str]
    """The setting and those below it that the argument states. Settings of an entry of a list have its number."""


def find_replaced(arguments: Iterable[PlacedArgument]) -> tuple[PlacedArgument, PlacedArgument] | None:
    """Return the first argument that an argument from another place replaces where it must not, and the latter.

    An argument of an axis must stay. One of `base` may be replaced by an axis, but not by a config file in which it is
    one setting of many, unless a later argument states it again. Settings that a config file of an axis states may be
    changed by later arguments, such as a batch size in the file of the data. A name such as `callbacks.rate` is a
    setting of the last entry of a list: after `--callbacks+=FILE` it is another setting than before.

    Args:
        arguments: All arguments of a cell in order.
    """
    cell = list(arguments)
    entries, before = Counter[str](), list[tuple[PlacedArgument, _Settings]]()
    for number, placed in enumerate(cell):
        # The settings of `--config=FILE` have no name before them.
        option, _, value = placed.argument.partition("=")
        name, is_added = setting_name(option), option.endswith("+")
        name = "" if name == "config" else name
        entries[name] += is_added
        if not is_added:
            for earlier, settings in before:
                if earlier.axis is None:
                    later = (setting_name(each.argument.partition("=")[0]) for each in cell[number:])
                    may_change = not is_file(value) or settings.name in later
                else:
                    may_change = earlier.axis == placed.axis
                if not may_change and _replaces(name, value, settings, entries):
                    return earlier, placed
        if placed.axis is not None or not is_file(value):
            content = None if is_added else parse_value(value)
            below = () if is_added else (_numbered(each, entries) for each in names_below(name, content))
            before.append((placed, _Settings(name, frozenset(below))))
    return None


def is_file(value: str) -> bool:
    """Return true if a value is the name of a config file."""
    return value.endswith(SUFFIXES)


def _replaces(name: str, value: str, settings: _Settings, entries: Mapping[str, int]) -> bool:
    content = None
    if not name or f"{settings.name}.".startswith(f"{name}."):
        content = _content(parse_value(value), Path())
        # A null and a list leave nothing of what was there, and neither does a new value of a list.
        if name and (content is None or isinstance(content, list) or entries[name]):
            return True
    return any(_numbered(each, entries) in settings.below for each in names_below(name, content))


def _numbered(name: str, entries: Mapping[str, int]) -> str:
    """Return a setting's name with the number of entries that were added to each list that it is in."""
    parts = name.split(".")
    numbers = (entries[".".join(parts[: end + 1])] for end in range(len(parts)))
    return ".".join(f"{part}+{number}" for part, number in zip(parts, numbers, strict=True))


def names_below(name: str, content: Any) -> Iterator[str]:
    """Yield the name of a setting, and the names of all settings below it that the content states.

    A mapping without a class changes what it states, and leaves the rest.
    """
    if name and (not isinstance(content, dict) or "class_path" in content):
        yield name
    if isinstance(content, dict):
        for key, entry in content.items():
            yield from names_below(setting_name(f"{name}.{key}".lstrip(".")), entry)


def _content(value: Any, folder: Path) -> Any:
    """Return a value with the contents of the config files that it names, relative to a folder."""
    if isinstance(value, dict):
        return {key: _content(entry, folder) for key, entry in value.items()}
    if isinstance(value, str) and value.endswith(SUFFIXES) and (path := folder / os.path.expandvars(value)).is_file():
        return _content(read_yaml(path), path.parent)
    return value
