"""A function as a command: its parameters are the settings, and its docstring is their help."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse

from lpc_lightning.cli.settings_parser import ShortErrors

SWITCH_VALUES = {
    form for word in ("true", "false", "yes", "no", "on", "off") for form in (word, word.title(), word.upper())
}
"""Values of a switch, as YAML 1.1 has them."""
TEXTS = ("prompt",)
"""Settings whose value on the command line is a text, whatever it is: `null` is a prompt."""
OPTION = re.compile(r"--\w[\w-]*(\.[\w-]+)*(=|\Z)")
"""Name of a setting, and the `=` of its value. Other arguments are values, even if they begin with hyphens."""
NULLS = {"", "~", "null", "Null", "NULL"}
"""Values of other texts that are null, as YAML has them. Other texts that YAML reads as nothing are comments."""


def run_function(function: Callable[..., Any], arguments: list[str], name: str) -> Any:
    """Call a function with settings from the command line.

    Every parameter is an option, `--batch_size` or `--batch-size`. A list takes several values, separated by spaces or
    commas. A list without a default is no option: its values are before, between or after the options, separated by
    spaces (a path may have commas). After an option that is a list, they would count as its values. A switch (bool)
    without a value is `true`. Its values are those of YAML. A prompt is a text, also if it is a word of YAML, and every
    text may begin with `#`, which begins a comment in YAML.

    Args:
        function: The function, with type hints and a Google-style docstring that describes each parameter.
        arguments: The command line after the command's name.
        name: The command's name.

    Returns:
        The result of the function.

    Raises:
        ConfigError: A setting is not known or missing, or a value is of another type.
    """
    docstring = parse(function.__doc__ or "")
    descriptions = {each.arg_name: each.description for each in docstring.params}
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    lists = {each: entry for each, hint in hints.items() if each != "return" and (entry := _entry(hint)) is not None}
    needed = [each for each, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    parser = ShortErrors(prog=f"lpc-lightning {name}", description=docstring.description, allow_abbrev=False)
    parser.required = tuple(each for each in needed if each not in lists)
    parser.add_argument("--config", action="config", help="A YAML file with any of these settings.")
    options = set(lists) - set(needed)
    for each, entry in lists.items():
        several: dict[str, Any] = {"nargs": "+", "type": entry, "help": descriptions[each]}
        if each in options:
            parser.add_argument(f"--{each}", default=parameters[each].default, **several)
        else:
            parser.add_argument(each, **several)
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=set(lists))
    switches = {each for each, hint in hints.items() if hint is bool}
    spelled = _spelled_out(arguments, options, switches)
    settings = parser.instantiate(parser.parse_args(spelled)).as_dict()  # a data class's fields are settings, too
    del settings["config"]
    for each in [each for each, hint in hints.items() if hint == str | None and settings.get(each, "") is None]:
        text = _text(spelled, each)
        settings[each] = text if each in TEXTS or text not in NULLS else None
    return function(**settings)


def _entry(hint: Any) -> Any:
    """Return the type of a list's entries: `str` for `list[str]` and `list[str] | None`. None for other types."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((get_args(option)[0] for option in options if get_origin(option) is list), None)


def _text(arguments: list[str], name: str) -> str | None:
    """Return the last value of an option as it was written. None if the option is not given."""
    for place in reversed(range(len(arguments))):
        option, equals, value = arguments[place].partition("=")
        if option == f"--{name}":
            return value if equals else arguments[place + 1]
    return None


def _spelled_out(arguments: list[str], lists: set[str], switches: set[str]) -> list[str]:
    """Return the arguments in the parser's form.

    Names have underscores, lists are split, every switch has a value, and values without an option are in one place, as
    the parser needs. They come after the last file of settings, which they override.
    """
    values: list[str] = []
    options: list[str] = []
    end_of_files = 0
    option, open_values = "", 0.0  # the values that the last option still takes
    for place, argument in enumerate(arguments):
        if not OPTION.match(argument):
            if open_values == 1 and argument.startswith("-"):
                options[-1] += f"={argument}"  # by itself, the parser takes it for an option
            else:
                taken = options if open_values > 0 else values
                taken += argument.split(",") if open_values > 0 and option in lists else [argument]
            open_values -= 1
            end_of_files = len(options) if option == "config" else end_of_files
            continue
        option, equals, value = argument.removeprefix("--").partition("=")
        option = option.replace("-", "_")
        options.append(f"--{option}" if option in lists else f"--{option}{equals}{value}")
        if option in lists and equals:
            options += value.split(",")
        open_values = float("inf") if option in lists else float(not equals)
        if option in switches and not equals and not SWITCH_VALUES & {*arguments[place + 1 : place + 2]}:
            options.append("true")
            open_values = 0
        end_of_files = len(options) if option == "config" else end_of_files
    return [*options[:end_of_files], *values, *options[end_of_files:]]
