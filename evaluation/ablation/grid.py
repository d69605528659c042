"""What an ablation consists of: a base, axes, and a cell for each combination of their values."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from lpc_lightning.errors import ConfigError

FIT = ("seed_everything", "trainer", "policy", "data", "model", "latent", "callbacks")
"""What a setting of `fit` begins with."""
LONGEST = 200
"""Characters of a cell's name: file systems take 255 bytes."""


@dataclass(frozen=True)
class Axis:
    """One thing that is varied."""

    name: str
    arguments: Mapping[str, tuple[str, ...]] | tuple[str, ...]
    """Arguments of `fit`: those of each value by its name; or those of all, with `{value}` where the value stands."""
    values: tuple[Any, ...]
    """What it is varied over: names, or the values themselves."""

    def of(self, value: Any) -> list[str]:
        """The arguments of `fit` that mean this value."""
        if isinstance(self.arguments, Mapping):
            return list(self.arguments[str(value)])
        return [argument.replace("{value}", spelled(value)) for argument in self.arguments]

    def over(self, values: Sequence[Any]) -> Axis:
        """The same axis over other values.

        Raises:
            ConfigError: A name that the axis does not know.
        """
        if isinstance(self.arguments, Mapping):
            values = [str(value) for value in values]
            if unknown := [value for value in values if value not in self.arguments]:
                raise ConfigError(f"{self.name}: found {', '.join(unknown)}, expected {', '.join(self.arguments)}.")
        return replace(self, values=tuple(values))


@dataclass(frozen=True)
class Cell:
    """One combination: a run."""

    axes: Mapping[str, Any]
    """Its value on each axis."""
    arguments: tuple[str, ...]
    """Arguments of `lpc-lightning fit`."""

    @property
    def name(self) -> str:
        """`algorithm=dpo,seed=1`, fit for a file system; told apart by a hash where characters had to go."""
        told = ",".join(f"{axis}={spelled(value)}" for axis, value in self.axes.items())
        safe = re.sub(r"[^A-Za-z0-9._+,=-]", "_", told)
        if safe == told and len(told) <= LONGEST:
            return told
        return f"{safe[:LONGEST]}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Grid:
    """All of it."""

    name: str
    base: tuple[str, ...]
    """Arguments of `fit` that all cells share."""
    axes: tuple[Axis, ...]
    skip: tuple[Mapping[str, Any], ...] = ()
    """Combinations left out: a value, or a list of values, for some of the axes."""
    settings: tuple[str, ...] = ()
    """Arguments that stand behind those of the axes."""

    def changed(self, changes: Sequence[str]) -> Grid:
        """The same grid after `AXIS=VALUE,VALUE` and `SETTING=VALUE` from the command line.

        Raises:
            ConfigError: Neither an axis nor a setting of `fit`, or a value that the axis does not know.
        """
        axes, settings = {axis.name: axis for axis in self.axes}, list(self.settings)
        for change in changes:
            name, equals, value = change.partition("=")
            if name in axes and equals:
                axes[name] = axes[name].over([yaml.safe_load(each) for each in value.split(",")])
            elif name.split(".")[0] in FIT and equals:
                settings.append(f"--{name}={value}")
            else:
                raise ConfigError(
                    f"ablate: found {change!r}, expected AXIS=VALUE,VALUE with one of the axes {', '.join(axes)}, or a "
                    "setting of fit such as trainer.max_steps=20."
                )
        return replace(self, axes=tuple(axes.values()), settings=tuple(settings))

    def cells(self) -> list[Cell]:
        """Every combination that is not skipped, the last axis changing fastest.

        Raises:
            ConfigError: None is left, or two are the same.
        """
        cells = [cell for values in product(*(axis.values for axis in self.axes)) if (cell := self._cell(values))]
        if not cells:
            raise ConfigError(f"{self.name}: found no cell, expected some: an axis is empty, or skip leaves all out.")
        if len({cell.name for cell in cells}) < len(cells):
            raise ConfigError(f"{self.name}: found a value twice on an axis, expected each once.")
        return cells

    def _cell(self, values: Sequence[Any]) -> Cell | None:
        at = {axis.name: value for axis, value in zip(self.axes, values, strict=True)}
        if any(_is_at(at, left_out) for left_out in self.skip):
            return None
        varied = [argument for axis in self.axes for argument in axis.of(at[axis.name])]
        return Cell(at, (*self.base, *varied, *self.settings))


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file; `configs/ablation/noise_tiny.yaml` shows all there is.

    Raises:
        ConfigError: The file is not there, or is no such grid.
    """
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"ablate: found no file {path} ({error.strerror}), expected a grid as YAML.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: found no YAML: {error}") from error
    known = {"base", "axes", "skip"}
    if not isinstance(told, dict) or not {"base", "axes"} <= set(told) <= known:
        found = ", ".join(map(str, told)) if isinstance(told, dict) else type(told).__name__
        raise ConfigError(f"{path}: found {found}, expected base, axes, and perhaps skip.")
    axes = tuple(_axis(str(name), axis, path) for name, axis in told["axes"].items())
    names, skip = [axis.name for axis in axes], tuple(told.get("skip") or ())
    for left_out in skip:
        if not isinstance(left_out, dict) or not set(left_out) <= set(names):
            raise ConfigError(f"{path} skip: found {left_out}, expected values for some of {', '.join(names)}.")
    return Grid(path.stem, tuple(_arguments(told["base"], f"{path} base")), axes, skip)


def spelled(value: Any) -> str:
    """A value as the command line spells it."""
    return value if isinstance(value, str) else json.dumps(value)


def _axis(name: str, told: Any, path: Path) -> Axis:
    where = f"{path} axes.{name}"
    if not isinstance(told, dict) or not told:
        raise ConfigError(f"{where}: found {told!r}, expected names with their arguments, or key and values.")
    values = told.get("values", list(told))
    if not isinstance(values, list) or set(told) == {"values"}:
        raise ConfigError(f"{where}: found {', '.join(told)}, expected a list of values, and key, arguments or names.")
    if set(told) not in ({"values", "key"}, {"values", "arguments"}):
        given = {str(value): of for value, of in told.items() if value != "values"}
        named = {value: tuple(_arguments(of, f"{where}.{value}")) for value, of in given.items()}
        return Axis(name, named, tuple(named)).over(values)
    arguments = [f"--{told['key']}={{value}}"] if "key" in told else _arguments(told["arguments"], where)
    return Axis(name, tuple(arguments), tuple(told["values"]))


def _arguments(told: Any, where: str) -> Iterator[str]:
    for argument in told or []:
        if not isinstance(argument, str) or not argument.startswith("--"):
            raise ConfigError(f"{where}: found {argument!r}, expected arguments of fit, such as --model.beta=0.1.")
        yield argument


def _is_at(cell: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    def among(value: Any, wanted: Any) -> bool:
        several = wanted if isinstance(wanted, list) else [wanted]
        return spelled(value) in [spelled(each) for each in several]

    return all(among(cell[axis], wanted) for axis, wanted in values.items())
