"""The arguments of a cell after those of its grid's base, each with its place in the grid."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat, takewhile
from typing import Any, Literal

from lpc_lightning.evaluation.ablation.grids.axes import control, parse_value, setting_name
from lpc_lightning.evaluation.ablation.grids.replaced import is_file, names_below

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


def place_arguments(
    cell: Mapping[str, Any], ablation: Mapping[str, Any], settings: Collection[str]
) -> Iterator[PlacedSettings]:
    """Yield the settings of a cell's arguments after the base, in their order. The last one that sets a setting counts.

    A cell has the arguments of the base, of its values on the axes in their order, of changes on the command line, and
    of the tuned axis. `ablation.json` has the base and the changes of the last command of its folder. So the arguments
    at the cell's beginning are those of the base, and these changes are at its end, if the cell ran with them. Of the
    others, one that belongs to no axis, or to an axis before that of an earlier one, is a change of another command.

    Args:
        cell: Content of `cell.json`.
        ablation: Content of the folder's `ablation.json`.
        settings: Names of all settings of the run, from its flattened config.
    """
    arguments, base, controls = cell["arguments"], ablation["base"], ablation["controls"]
    names = [_settings(argument, name) for argument, name in zip(arguments, _resolve(arguments, settings), strict=True)]
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(arguments, base, strict=False))
    shared = sum(1 for _ in equal)
    rest, changes = arguments[shared:], base[shared:]
    others = [axis for axis in controls if axis != "seed"]
    count = _count_tuned(rest, [controls[axis] for axis in others]) if cell["tuned"] else 0
    end = len(rest) - count
    start = end - len(changes) if rest[:end][-len(changes) :] == changes else end
    places: list[tuple[Place, tuple[str, ...]]] = [
        *_place_own(rest[:start], controls),
        *repeat(("change", ()), end - start),
        *repeat(("tuning", tuple(others)), count),
    ]
    for own, (place, axes) in zip(names[shared:], places, strict=True):
        yield PlacedSettings(own, place, axes)


def _count_tuned(arguments: Sequence[str], controls: Sequence[Sequence[str]]) -> int:
    """Return the number of arguments of the tuned axis, which come last.

    Its settings are also the last ones of the controls of all axes but `seed`. Of a single such axis, only the last
    one is known to be tuned.
    """
    if not controls:
        return 1
    ends = zip(*(reversed(each) for each in controls), strict=False)
    tuned = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, ends)]
    known = tuned if len(controls) > 1 else tuned[:1]
    return sum(1 for _ in takewhile(lambda argument: setting_name(argument) in known, reversed(arguments)))


def _place_own(
    arguments: Iterable[str], controls: Mapping[str, Collection[str]]
) -> Iterator[tuple[Place, tuple[str, ...]]]:
    """Yield the places of the arguments of axes, in their order, and of changes that another command had."""
    axes, first = list(controls), 0
    for argument in arguments:
        fitting = (number for number in range(first, len(axes)) if control(argument) in controls[axes[number]])
        number = next(fitting, None)
        if number is None:
            yield "change", ()
        else:
            first = number
            yield "axis", (axes[number],)


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
