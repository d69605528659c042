"""The arguments of a cell after those of its grid's base, each with its place in the grid."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from lpc_lightning.evaluation.ablation.grids.axes import control, parse_value, setting_name
from lpc_lightning.evaluation.ablation.grids.replaced import is_file, names_below


@dataclass(frozen=True)
class PlacedSettings:
    """The settings of one argument, with the argument's place in the grid."""

    names: tuple[str, ...]
    """Names of the settings. `latent.*` means the setting `latent` and everything below it."""
    place: Literal["axis", "tuning", "change"]
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


def place_arguments(cell: Mapping[str, Any], ablation: Mapping[str, Any]) -> Iterator[PlacedSettings]:
    """Yield the settings of a cell's arguments after the base, in their order. The last one that sets a setting counts.

    A cell has the arguments of the base, of its values on the axes in their order, of changes on the command line, and
    of the tuned axis. `ablation.json` has the base and the changes of the last command of its folder. So the arguments
    at the cell's beginning are those of the base, and these changes are at its end, if the cell ran with them. Of the
    others, one that belongs to no axis, or to an axis before that of an earlier one, is a change of another command.

    Args:
        cell: Content of `cell.json`.
        ablation: Content of the folder's `ablation.json`.
    """
    arguments, base, controls = cell["arguments"], ablation["base"], ablation["controls"]
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(arguments, base, strict=False))
    shared = sum(1 for _ in equal)
    rest, changes = arguments[shared:], base[shared:]
    others = [axis for axis in controls if axis != "seed"]
    count = _count_tuned(rest, [controls[axis] for axis in others]) if cell["tuned"] else 0
    end = len(rest) - count
    start = end - len(changes) if rest[:end][-len(changes) :] == changes else end
    yield from _place_own(rest[:start], controls)
    yield from (PlacedSettings(_settings(argument), "change") for argument in rest[start:end])
    yield from (PlacedSettings(_settings(argument), "tuning", tuple(others)) for argument in rest[end:])


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


def _place_own(arguments: Iterable[str], controls: Mapping[str, Collection[str]]) -> Iterator[PlacedSettings]:
    """Yield the settings of the arguments of axes, in their order, and of changes that another command had."""
    axes, first = list(controls), 0
    for argument in arguments:
        fitting = (number for number in range(first, len(axes)) if control(argument) in controls[axes[number]])
        number = next(fitting, None)
        if number is None:
            yield PlacedSettings(_settings(argument), "change")
        else:
            first = number
            yield PlacedSettings(_settings(argument), "axis", (axes[number],))


def _settings(argument: str) -> tuple[str, ...]:
    """Return the settings that an argument sets, as names of a flattened config."""
    option, _, value = argument.partition("=")
    setting = setting_name(option)
    if setting.partition(".")[0] == "callbacks":
        return ("callbacks.*",)
    if is_file(value) or option.endswith("+"):
        return (f"{setting}.*",)
    return tuple(names_below(setting, parse_value(value)))
