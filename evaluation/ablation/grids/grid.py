"""A grid of cells: base arguments, axes, and a cell for each combination of their values."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.axes import (
    Axis,
    as_json,
    matches,
    read_arguments,
    read_axis,
    setting_name,
    split_values,
    to_text,
)
from lpc_lightning.evaluation.ablation.grids.replaced import BASE, CHANGE, TUNED, PlacedArgument, find_replaced
from lpc_lightning.evaluation.ablation.grids.tuning import Tuning, read_tuning
from lpc_lightning.files.yaml_files import parse_yaml, read_yaml

FIT_SETTINGS = ("seed_everything", "trainer", "policy", "data", "model", "latent", "callbacks")
"""First parts of the names of `fit`'s settings."""
KEYS = {"extends", "base", "axes", "tune", "skip"}
"""Keys of a grid file."""
MAX_NAME_LENGTH = 200
"""Maximum number of characters of a cell's name. File systems allow 255 bytes."""


@dataclass(frozen=True)
class Cell:
    """One combination of values: one run."""

    axes: Mapping[str, Any]
    """The cell's value on each axis."""
    placed: tuple[PlacedArgument, ...]
    """Arguments of `lpc-lightning fit`, with their places in the grid."""
    tuned: Mapping[str, Any] = field(default_factory=dict)
    """The tuned axis with the value that was chosen for the cell. Empty: the grid has no tuned axis."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of `lpc-lightning fit`."""
        return tuple(placed.argument for placed in self.placed)

    @property
    def group(self) -> dict[str, Any]:
        """The cell's value on each axis except `seed`."""
        return {axis: value for axis, value in self.axes.items() if axis != "seed"}

    @property
    def name(self) -> str:
        """A name for files, such as `algorithm=dpo,seed=1`. If characters had to be removed, it ends with a hash."""
        text = ",".join(f"{axis}={to_text(value)}" for axis, value in self.axes.items())
        safe = re.sub(r"[^A-Za-z0-9._+,=-]", "_", text)
        if safe == text and len(text) <= MAX_NAME_LENGTH:
            return text
        return f"{safe[:MAX_NAME_LENGTH]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Grid:
    """A grid of cells."""

    name: str
    base: tuple[str, ...]
    """Arguments of `fit` that all cells share."""
    axes: tuple[Axis, ...]
    skip: tuple[Mapping[str, Any], ...] = ()
    """Combinations that are left out: for some of the axes, a list of values."""
    settings: tuple[str, ...] = ()
    """Arguments of all cells that come after those of the axes."""
    tune: Tuning | None = None
    """The tuned axis, which is not among `axes`."""

    def __post_init__(self) -> None:
        """Check that each cell runs at its values of the axes, and that no seed is used for both tuning and results.

        Raises:
            ConfigError: There is no axis `seed`, a seed is used twice, an argument replaces one of an axis, or it sets
                the tuned setting.
        """
        self._check_axes()
        if self.tune is None:
            return
        seeds = next((axis.values for axis in self.axes if axis.name == "seed"), None)
        if seeds is None:
            raise ConfigError(f"{self.name} tune: found no axis seed, expected one, for the runs at the chosen values.")
        if shared := {to_text(seed) for seed in self.tune.seeds} & {to_text(seed) for seed in seeds}:
            raise ConfigError(
                f"{self.name} tune.seeds: found {', '.join(sorted(shared))}, which the axis seed also has, expected "
                "other seeds: results of a seed that was used for tuning are biased."
            )
        tuned = self.tune.axis
        for label, argument in self._fixed_arguments():
            if any(f"{setting_name(argument)}.".startswith(f"{name}.") for name in tuned.settings):
                raise ConfigError(
                    f"{self.name} {label}: found {argument}, which sets the tuned axis {tuned.name}, expected no such "
                    "argument: the values of a tuned axis are the same for all cells (tune.values)."
                )

    def _check_axes(self) -> None:
        """Check that no argument replaces one that must stay, in the cells of the selected values."""
        for values in self._combinations():
            if replaced := find_replaced([*self._arguments(values), *self._later_arguments()]):
                before, after = replaced
                if before.axis is None:
                    place = "at the end of the command" if after.place == CHANGE else f"in {after.place}"
                    raise ConfigError(
                        f"{self.name} {after.place}: found {after.argument}, whose file replaces {before.argument} of "
                        f"{before.place}, expected the latter after the file. State it {place}."
                    )
                raise ConfigError(
                    f"{self.name} {after.place}: found {after.argument}, which replaces {before.argument} of the axis "
                    f"{before.axis}, expected no such argument: cells would run at one value under the name of "
                    f"another. Change the axis ({before.axis}=VALUE), or its arguments in a grid file that extends "
                    "this one."
                )

    def _later_arguments(self) -> Iterator[PlacedArgument]:
        """Yield the arguments after those of the axes. Those of the tuning are not in cells of the result."""
        tuning = () if self.tune is None else self.tune.arguments
        yield from (PlacedArgument(argument, "tune.arguments") for argument in tuning)
        yield from (PlacedArgument(argument, CHANGE) for argument in self.settings)

    def _fixed_arguments(self) -> Iterator[tuple[str, str]]:
        """Yield the arguments of base, tuning cells, all values of the axes and command line, each with its place."""
        yield from (("base", argument) for argument in self.base)
        yield from (("tune.arguments", argument) for argument in (self.tune.arguments if self.tune else ()))
        for axis in self.axes:
            named = axis.arguments if isinstance(axis.arguments, Mapping) else {"arguments": axis.arguments}
            yield from ((f"axes.{axis.name}.{name}", each) for name, arguments in named.items() for each in arguments)
        yield from (("change", argument) for argument in self.settings)

    def with_changes(self, changes: Sequence[str]) -> Grid:
        """Return the grid after the changes `AXIS=VALUE,VALUE` and `SETTING=VALUE` from the command line.

        `tune.seeds=VALUE,VALUE` and the like change the section `tune`.

        Raises:
            ConfigError: A change is neither for an axis nor for a setting of `fit`, the axis has no such value, or two
                changes are for the same axis.
        """
        axes, settings, tune = {axis.name: axis for axis in self.axes}, list(self.settings), self.tune
        earlier: dict[str, str] = {}
        for change in changes:
            name, equals, value = change.partition("=")
            is_tuning = tune is not None and (name == tune.axis.name or name.startswith("tune."))
            if name in earlier and (name in axes or is_tuning):
                raise ConfigError(
                    f"ablate: found {earlier[name]} and {change}, expected one change of {name} with all values: "
                    f"{name}=VALUE,VALUE."
                )
            earlier[name] = change
            if tune is not None and is_tuning and equals:
                field_name = "values" if name == tune.axis.name else name.removeprefix("tune.")
                tune = tune.with_change(field_name, _parse_values(value, name))
            elif name in axes and equals:
                axes[name] = axes[name].with_values(_parse_values(value, name))
            elif name.split(".")[0] in FIT_SETTINGS and equals:
                settings.append(f"--{name}={value}")
            else:
                names = ", ".join([*axes, *([] if tune is None else [tune.axis.name])])
                raise ConfigError(
                    f"ablate: found {change!r}, expected AXIS=VALUE,VALUE with one of the axes {names}, or a setting "
                    "of fit such as trainer.max_steps=20."
                )
        return replace(self, axes=tuple(axes.values()), settings=tuple(settings), tune=tune)

    def cells(self) -> list[Cell]:
        """Return the cells of all combinations that are not skipped. The last axis changes fastest.

        They have no value on the tuned axis (see `at`).

        Raises:
            ConfigError: There are no axes or no cells, or two cells are equal.
        """
        cells = [self._cell(value_by_axis) for value_by_axis in self._combinations()]
        if not self.axes:
            raise ConfigError(f"{self.name} axes: found none, expected at least one, such as seed.")
        if not cells:
            raise ConfigError(
                f"{self.name}: found no cell, expected at least one: an axis has no values, or skip leaves out all "
                "combinations."
            )
        if len({cell.name for cell in cells}) < len(cells):
            raise ConfigError(f"{self.name}: found a value twice on an axis, expected each value once.")
        return cells

    def tuning_cells(self, value: Any) -> list[Cell]:
        """Return the cells of all groups and all tuning seeds at a value of the tuned axis."""
        assert self.tune is not None
        axis, seeds = self.tune.axis, self.tune.seeds
        axes = tuple(each.with_values(seeds) if each.name == "seed" else each for each in self.axes)
        settings = (*self.tune.arguments, *self.settings)
        return [
            Cell({**cell.group, axis.name: value, "seed": cell.axes["seed"]}, self.at(cell, value).placed)
            for cell in replace(self, axes=axes, settings=settings, tune=None).cells()
        ]

    def at(self, cell: Cell, value: Any) -> Cell:
        """Return a cell with the value that was chosen on the tuned axis.

        The arguments of the tuned axis come last, so that no config file of another axis replaces them.
        """
        assert self.tune is not None
        axis = self.tune.axis
        chosen = (PlacedArgument(argument, TUNED) for argument in axis.arguments_for(value))
        return replace(cell, placed=(*cell.placed, *chosen), tuned={axis.name: value})

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """Yield all combinations of values that are not skipped, as values by axis."""
        names = [axis.name for axis in self.axes]
        for values in product(*(axis.values for axis in self.axes)):
            value_by_axis = dict(zip(names, values, strict=True))
            if not any(matches(value_by_axis, combination) for combination in self.skip):
                yield value_by_axis

    def _arguments(self, value_by_axis: Mapping[str, Any]) -> Iterator[PlacedArgument]:
        """Yield the arguments of the base and of a value on each axis."""
        yield from (PlacedArgument(argument, BASE) for argument in self.base)
        for axis in self.axes:
            arguments = axis.arguments_for(value_by_axis[axis.name])
            yield from (PlacedArgument(argument, f"axes.{axis.name}", axis.name) for argument in arguments)

    def _cell(self, value_by_axis: Mapping[str, Any]) -> Cell:
        changes = (PlacedArgument(argument, CHANGE) for argument in self.settings)
        return Cell(value_by_axis, (*self._arguments(value_by_axis), *changes))


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file. `configs/ablation/noise_tiny.yaml` shows all features.

    A file has `base` (arguments of `fit` for all cells), `axes`, and optionally `tune` (see `Tuning`) and `skip`. With
    `extends: FILE` it states what differs from another grid file: mappings are merged, lists replace lists, and null
    removes a key. Keys that a file names come after the others, in its order. FILE is relative to the file's folder.

    Raises:
        ConfigError: The file does not exist, or is not a grid.
    """
    return _grid(_read(path, "ablate", ()), path)


def _read(path: Path, label: str, extending: tuple[Path, ...]) -> dict[str, Any]:
    """Return the content of a file, merged with the content of the file that it extends.

    Args:
        path: The file.
        label: What names the file, for errors.
        extending: Files that extend this one.
    """
    if not path.is_file():
        raise ConfigError(f"{label}: found no file {path}, expected a grid as YAML.")
    content = read_yaml(path)
    if not isinstance(content, dict) or not set(content) <= KEYS:
        raise _wrong_keys(content, path)
    extended = content.pop("extends", None)
    if extended is None:
        return content
    label, files = f"{path} extends", (*extending, path.resolve())
    if not isinstance(extended, str):
        raise ConfigError(f"{label}: found {extended!r}, expected the name of a grid file.")
    other = path.parent / extended
    if other.resolve() in files:
        raise ConfigError(f"{label}: found {extended}, which extends {path.name}, expected a grid file that does not.")
    theirs = _read(other, label, files)
    _grid(theirs, other)  # an error names the file that has it
    return _merge(theirs, content, str(path))


def _merge(theirs: Mapping[str, Any], ours: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return their mapping with our changes (see `read_grid`)."""
    merged = {key: value for key, value in theirs.items() if key not in ours}
    for key, value in ours.items():
        if value is None and key not in theirs:
            raise ConfigError(
                f"{label} {key}: found null, which removes what the extended file states, and it states no {key}. "
                f"Expected one of {', '.join(map(str, theirs))}."
            )
        if isinstance(value, dict) and isinstance(theirs.get(key), dict):
            merged[key] = _merge(theirs[key], value, f"{label} {key}")
        elif value is not None:
            merged[key] = value
    return merged


def _grid(content: Mapping[str, Any], path: Path) -> Grid:
    if not {"base", "axes"} <= set(content) or not isinstance(content["axes"], dict):
        raise _wrong_keys(content, path)
    contents, tune = dict(content["axes"]), content.get("tune")
    if tune is not None:
        name = tune.get("axis") if isinstance(tune, dict) else None
        tune = read_tuning(tune, contents.pop(name, None), str(path))
    axes = tuple(read_axis(str(name), axis, f"{path} axes.{name}") for name, axis in contents.items())
    skip = tuple(_read_skip(each, axes, f"{path} skip") for each in content.get("skip") or ())
    return Grid(path.stem, tuple(read_arguments(content["base"], f"{path} base")), axes, skip, tune=tune)


def _read_skip(combination: Any, axes: Sequence[Axis], label: str) -> dict[str, list[Any]]:
    """Return the values of a combination to leave out, as a list for each of its axes.

    Raises:
        ConfigError: It names an axis that there is not, or a value that an axis with named values does not have.
    """
    by_name = {axis.name: axis for axis in axes}
    if not isinstance(combination, dict) or not set(combination) <= set(by_name):
        raise ConfigError(f"{label}: found {combination}, expected values for some of {', '.join(by_name)}.")
    try:
        return {
            name: list(by_name[name].with_values(values if isinstance(values, list) else [values]).values)
            for name, values in combination.items()
        }
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from None


def _wrong_keys(content: Any, path: Path) -> ConfigError:
    keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    return ConfigError(f"{path}: found {keys}, expected base, axes, and optionally tune, skip and extends.")


def _parse_values(text: str, name: str) -> list[Any]:
    return [as_json(parse_yaml(part, name), name) for part in split_values(text)]
