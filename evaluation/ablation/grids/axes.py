"""Axes of a grid: names, values, and the arguments of `fit` that a value stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.yaml_files import parse_yaml


@dataclass(frozen=True)
class Axis:
    """One axis of a grid."""

    name: str
    arguments: Mapping[str, tuple[str, ...]] | tuple[str, ...]
    """Arguments of `fit`. Either those of each value, by the value's name; or those of all values, where `{value}` is
    replaced by the value."""
    values: tuple[Any, ...]
    """Names of values, or the values themselves. 0 and 0.0 are two values: a share of 1.0 is all, and 1 is one item."""

    def arguments_for(self, value: Any) -> list[str]:
        """Return the arguments of `fit` for a value."""
        if isinstance(self.arguments, Mapping):
            return list(self.arguments[str(value)])
        return [argument.replace("{value}", to_text(value)) for argument in self.arguments]

    @property
    def settings(self) -> list[str]:
        """Names of the settings that the axis sets, for any of its values (see `setting_name`)."""
        lists = self.arguments.values() if isinstance(self.arguments, Mapping) else [self.arguments]
        return list(dict.fromkeys(setting_name(argument) for arguments in lists for argument in arguments))

    def with_values(self, values: Sequence[Any]) -> Axis:
        """Return the same axis with other values.

        A text such as 3e-4, which is no number in YAML, becomes the number that it is in a fit.

        Raises:
            ConfigError: The axis has named values, and a name is not one of them. Or see `as_json`.
        """
        values = [as_json(value, self.name) for value in values]
        if isinstance(self.arguments, Mapping):
            values = [str(value) for value in values]
            if unknown := [value for value in values if value not in self.arguments]:
                raise ConfigError(f"{self.name}: found {', '.join(unknown)}, expected {', '.join(self.arguments)}.")
            return replace(self, values=tuple(values))
        return replace(self, values=tuple(float(value) if _is_exponential(value) else value for value in values))


def as_json(value: Any, label: str) -> Any:
    """Return a value of YAML as JSON has it: a date becomes its text, such as 2024-01-01.

    Args:
        value: The value.
        label: Name of the axis or the setting, for errors.

    Raises:
        ConfigError: JSON has no such value.
    """
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, list):
        return [as_json(each, label) for each in value]
    if isinstance(value, dict):
        return {as_json(key, label): as_json(each, label) for key, each in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ConfigError(
        f"{label}: found {value!r}, which is a {type(value).__name__}, expected a number, a text, true, false, null, "
        "or lists and mappings of these. Write a text in quotes."
    )


def to_text(value: Any) -> str:
    """Return a value as written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _is_exponential(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}", value) is not None


def matches(value_by_axis: Mapping[str, Any], combination: Mapping[str, Any]) -> bool:
    """Return True if a cell has the values of a combination, or one of several values per axis.

    Numbers are compared as numbers: 0 is 0.0. Other values are compared as written on the command line.
    """

    def is_same(value: Any, allowed: Any) -> bool:
        if all(isinstance(each, int | float) and not isinstance(each, bool) for each in (value, allowed)):
            return bool(value == allowed)
        return to_text(value) == to_text(allowed)

    return all(
        any(is_same(value_by_axis[axis], each) for each in (allowed if isinstance(allowed, list) else [allowed]))
        for axis, allowed in combination.items()
    )


@cache
def parse_value(text: str) -> Any:
    """Parse a value as written on the command line. Text that is no YAML is a text."""
    try:
        return parse_yaml(text, "")
    except ConfigError:
        return text


def split_values(text: str) -> Iterator[str]:
    """Yield the parts of a list of values, separated by commas that are outside brackets and quotes.

    A bracket or a quote inside a text, as in `it's`, is a character of the text.
    """
    start, depth, quote, position = 0, 0, "", 0
    while position < len(text):
        character, before = text[position], text[start:position].rstrip()
        if quote:
            is_escape = character == "\\" if quote == '"' else text[position : position + 2] == "''"
            if is_escape:
                position += 1
            elif character == quote:
                quote = ""
        elif character in "\"'" and (not before or (depth and before[-1] in "[{,:")):
            quote = character
        elif character in "[{" and (depth or not before):
            depth += 1
        elif character in "]}" and depth:
            depth -= 1
        elif character == "," and not depth:
            yield text[start:position]
            start = position + 1
        position += 1
    yield text[start:]


def read_axis(name: str, content: Any, label: str) -> Axis:
    """Read an axis: `key` or `arguments` with `values`, or names with their arguments.

    Args:
        name: Name of the axis.
        content: Content of the file.
        label: Place in the file, for errors.

    Raises:
        ConfigError: The content is not an axis.
    """
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{label}: found {content!r}, expected names with their arguments, or key and values.")
    values = content.get("values", list(content))
    if not isinstance(values, list) or set(content) == {"values"}:
        raise ConfigError(
            f"{label}: found {', '.join(content)}, expected a list of values, and key, arguments or names."
        )
    if set(content) not in ({"values", "key"}, {"values", "arguments"}):
        named_arguments = {
            str(as_json(value, label)): tuple(read_arguments(arguments, f"{label}.{value}"))
            for value, arguments in content.items()
            if value != "values"
        }
        return Axis(name, named_arguments, tuple(named_arguments)).with_values(values)
    arguments = [f"--{content['key']}={{value}}"] if "key" in content else read_arguments(content["arguments"], label)
    return Axis(name, tuple(arguments), ()).with_values(content["values"])


def read_arguments(content: Any, label: str) -> Iterator[str]:
    """Yield the arguments of a list.

    Raises:
        ConfigError: An entry is not an argument.
    """
    for argument in content or []:
        if not isinstance(argument, str) or not argument.startswith("--"):
            raise ConfigError(f"{label}: found {argument!r}, expected arguments of fit, such as --model.beta=0.1.")
        yield argument


def setting_name(argument: str) -> str:
    """Return the name of the setting that an argument of `fit` sets, such as `model.optimizer.lr`.

    `init_args` is left out, because a name with it means the same setting as one without it.
    """
    name = argument.removeprefix("--").partition("=")[0].removesuffix("+")
    return ".".join(part for part in name.split(".") if part != "init_args")
