"""The arguments of a cell after those of its grid's base, each with its place in the grid."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lpc_lightning.evaluation.ablation.grids.axes import parse_value, setting_name
from lpc_lightning.evaluation.ablation.grids.replaced import BASE, CHANGE, TUNED, is_file, names_below

Place = Literal["axis", "tuning", "change"]


@dataclass(frozen=True)
class PlacedSettings:
    """The settings of one argument, with the argument's place in the grid."""

    names: tuple[str, ...]
    """Names of the settings. `latent.*` means the setting `latent` and everything below it."""
    place: Place
    """`axis`: the cell's value on an axis has the argument. `tuning`: it states the cell's value on the tuned axis.
    `change`: the command line has it, so that the grid file states another value."""
    axes: tuple[str, ...] = ()
    """Axes on which the value of the settings depends: for a tuned value all but `seed`, because a value is chosen for
    each of their combinations."""

    def sets(self, name: str) -> bool:
        """Return true if the argument sets a setting."""
        return any(
            f"{name}.".startswith(each.removesuffix("*")) if each.endswith(".*") else name == each
            for each in self.names
        )


def place_arguments(cell: Mapping[str, Any], settings: Collection[str]) -> Iterator[PlacedSettings]:
    """Yield the settings of a cell's arguments after the base, in their order. The last one that sets a setting counts.

    Args:
        cell: Content of `cell.json`.
        settings: Names of all settings of the run, from its flattened config.
    """
    names, others = _resolve(cell["arguments"], settings), tuple(axis for axis in cell["axes"] if axis != "seed")
    for argument, name, place in zip(cell["arguments"], names, cell["places"], strict=True):
        own, axis = _settings(argument, name), place.removeprefix("axes.")
        if place == TUNED:
            yield PlacedSettings(own, "tuning", others)
        elif place == CHANGE:
            yield PlacedSettings(own, "change")
        elif place != BASE:
            yield PlacedSettings(own, "axis", (axis,))


def _resolve(arguments: Sequence[str], settings: Collection[str]) -> list[str]:
    """Return the name of each argument's setting, for one of a callback with its class. Empty: it is not known.

    `--callbacks+=FILE` adds a callback to the end of the list, and `--callbacks.seed=1` is a setting of the last one.
    So the last callback of the run is that of the last argument that adds one, if every file has one callback. If a
    name does not fit, it is not known what the argument sets.
    """
    callbacks, names = [name for name in settings if re.fullmatch(r"callbacks\.[^.]+", name)], list[str]()
    for argument in reversed(arguments):
        option, _, value = argument.partition("=")
        name, is_added = setting_name(option), option.endswith("+")
        if name == "callbacks" and is_added:
            name = callbacks.pop() if callbacks else ""
            class_name = name.rpartition(".")[2].partition("-")[0]
            name = name if is_file(value) or class_name in re.findall(r"\w+", value) else ""
        elif name == "callbacks":
            callbacks = []
        elif name.startswith("callbacks."):
            name = name.replace("callbacks", callbacks[-1], 1) if callbacks else ""
            name = name if any(f"{each}.".startswith(f"{name}.") for each in settings) else ""
        names.append(name)
    return names[::-1]


def _settings(argument: str, name: str) -> tuple[str, ...]:
    """Return the settings that an argument sets, as names of a flattened config."""
    option, _, value = argument.partition("=")
    if not name:
        return ()
    if is_file(value) or option.endswith("+"):
        return (f"{name}.*",)
    return tuple(names_below(name, parse_value(value)))
