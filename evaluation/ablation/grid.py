"""A grid of cells: base arguments, axes, and a cell for each combination of their values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.yaml_files import parse_yaml, read_yaml

FIT_SETTINGS = ("seed_everything", "trainer", "policy", "data", "model", "latent", "callbacks")
"""First parts of the names of `fit`'s settings."""
KEYS = {"extends", "base", "axes", "skip"}
"""Keys of a grid file."""
MAX_NAME_LENGTH = 200
"""Maximum number of characters of a cell's name. File systems allow 255 bytes."""


@dataclass(frozen=True)
class Axis:
    """One axis of a grid."""

    name: str
    arguments: Mapping[str, tuple[str, ...]] | tuple[str, ...]
    """Arguments of `fit`. Either those of each value, by the value's name; or those of all values, where `{value}` is
    replaced by the value."""
    values: tuple[Any, ...]
    """Names of values, or the values themselves."""

    def arguments_for(self, value: Any) -> list[str]:
        """Return the arguments of `fit` for a value."""
        if isinstance(self.arguments, Mapping):
            return list(self.arguments[str(value)])
        return [argument.replace("{value}", to_text(value)) for argument in self.arguments]

    def with_values(self, values: Sequence[Any]) -> Axis:
        """Return the same axis with other values.

        Raises:
            ConfigError: The axis has named values, and a name is not one of them.
        """
        if isinstance(self.arguments, Mapping):
            values = [str(value) for value in values]
            if unknown := [value for value in values if value not in self.arguments]:
                raise ConfigError(f"{self.name}: found {', '.join(unknown)}, expected {', '.join(self.arguments)}.")
        return replace(self, values=tuple(values))


@dataclass(frozen=True)
class Cell:
    """One combination of values: one run."""

    axes: Mapping[str, Any]
    """The cell's value on each axis."""
    arguments: tuple[str, ...]
    """Arguments of `lpc-lightning fit`."""

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
    """Combinations that are left out: for some of the axes, a value or a list of values."""
    settings: tuple[str, ...] = ()
    """Arguments of all cells that come after those of the axes."""

    def with_changes(self, changes: Sequence[str]) -> Grid:
        """Return the grid after the changes `AXIS=VALUE,VALUE` and `SETTING=VALUE` from the command line.

        Raises:
            ConfigError: A change is neither for an axis nor for a setting of `fit`, or the axis has no such value.
        """
        axes, settings = {axis.name: axis for axis in self.axes}, list(self.settings)
        for change in changes:
            name, equals, value = change.partition("=")
            if name in axes and equals:
                axes[name] = axes[name].with_values([parse_yaml(part, name) for part in value.split(",")])
            elif name.split(".")[0] in FIT_SETTINGS and equals:
                settings.append(f"--{name}={value}")
            else:
                raise ConfigError(
                    f"ablate: found {change!r}, expected AXIS=VALUE,VALUE with one of the axes {', '.join(axes)}, or a "
                    "setting of fit such as trainer.max_steps=20."
                )
        return replace(self, axes=tuple(axes.values()), settings=tuple(settings))

    def cells(self) -> list[Cell]:
        """Return the cells of all combinations that are not skipped. The last axis changes fastest.

        Raises:
            ConfigError: There are no cells, or two cells are equal.
        """
        combinations = product(*(axis.values for axis in self.axes))
        cells = [cell for values in combinations if (cell := self._cell(values))]
        if not cells:
            raise ConfigError(
                f"{self.name}: found no cell, expected at least one: an axis has no values, or skip leaves out all "
                "combinations."
            )
        if len({cell.name for cell in cells}) < len(cells):
            raise ConfigError(f"{self.name}: found a value twice on an axis, expected each value once.")
        return cells

    def _cell(self, values: Sequence[Any]) -> Cell | None:
        value_by_axis = {axis.name: value for axis, value in zip(self.axes, values, strict=True)}
        if any(_matches(value_by_axis, combination) for combination in self.skip):
            return None
        axis_arguments = [argument for axis in self.axes for argument in axis.arguments_for(value_by_axis[axis.name])]
        return Cell(value_by_axis, (*self.base, *axis_arguments, *self.settings))


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file. `configs/ablation/noise_tiny.yaml` shows all features.

    A file has `base` (arguments of `fit` for all cells), `axes`, and optionally `skip`. With `extends: FILE` it states
    what differs from another grid file: mappings are merged, lists replace lists, and null removes a key. Keys that a
    file names come after the others, in its order. FILE is relative to the file's folder.

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
    axes = tuple(_axis(str(name), axis, path) for name, axis in content["axes"].items())
    names, skip = [axis.name for axis in axes], tuple(content.get("skip") or ())
    for combination in skip:
        if not isinstance(combination, dict) or not set(combination) <= set(names):
            raise ConfigError(f"{path} skip: found {combination}, expected values for some of {', '.join(names)}.")
    return Grid(path.stem, tuple(_arguments(content["base"], f"{path} base")), axes, skip)


def _wrong_keys(content: Any, path: Path) -> ConfigError:
    keys = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    return ConfigError(f"{path}: found {keys}, expected base, axes, and optionally skip and extends.")


def to_text(value: Any) -> str:
    """Return a value as written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _axis(name: str, content: Any, path: Path) -> Axis:
    label = f"{path} axes.{name}"
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{label}: found {content!r}, expected names with their arguments, or key and values.")
    values = content.get("values", list(content))
    if not isinstance(values, list) or set(content) == {"values"}:
        raise ConfigError(
            f"{label}: found {', '.join(content)}, expected a list of values, and key, arguments or names."
        )
    if set(content) not in ({"values", "key"}, {"values", "arguments"}):
        named_arguments = {
            str(value): tuple(_arguments(arguments, f"{label}.{value}"))
            for value, arguments in content.items()
            if value != "values"
        }
        return Axis(name, named_arguments, tuple(named_arguments)).with_values(values)
    arguments = [f"--{content['key']}={{value}}"] if "key" in content else _arguments(content["arguments"], label)
    return Axis(name, tuple(arguments), tuple(content["values"]))


def _arguments(content: Any, label: str) -> Iterator[str]:
    for argument in content or []:
        if not isinstance(argument, str) or not argument.startswith("--"):
            raise ConfigError(f"{label}: found {argument!r}, expected arguments of fit, such as --model.beta=0.1.")
        yield argument


def _matches(value_by_axis: Mapping[str, Any], combination: Mapping[str, Any]) -> bool:
    """Return True if a cell has the values of a combination, or one of several values per axis."""

    def is_among(value: Any, allowed: Any) -> bool:
        allowed_values = allowed if isinstance(allowed, list) else [allowed]
        return to_text(value) in [to_text(allowed_value) for allowed_value in allowed_values]

    return all(is_among(value_by_axis[axis], allowed) for axis, allowed in combination.items())
