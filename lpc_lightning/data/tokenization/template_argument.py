"""Type of the values of `data.template_kwargs`. The parser reads the texts of other types as YAML, also in files."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import get_loader
from jsonargparse.typing import register_type

MARK = "\0"
"""Start of a text of the command line. No argument of a program contains this character, and no text of plain YAML."""
OPTION = re.compile(r"--data\.(?:init_args\.)?template_kwargs\.")

if TYPE_CHECKING:
    TemplateArgument = Any
else:

    class TemplateArgument:
        """Value of an argument of the chat template: any value of YAML."""


def mark_texts(arguments: Sequence[str] | None) -> list[str]:
    """Mark the texts of single template arguments, so that they differ from those of a file.

    Args:
        arguments: The command line after the program's name. None: that of this process.
    """
    marked: list[str] = []
    is_value = False
    for argument in sys.argv[1:] if arguments is None else arguments:
        option, equals, text = argument.partition("=")
        is_option = OPTION.match(option) is not None
        if is_value and not argument.startswith("--"):
            marked.append(MARK + argument)
        else:
            marked.append(f"{option}={MARK}{text}" if is_option and equals else argument)
        is_value = is_option and not equals
    return marked


def _is_final(value: Any, _: type) -> bool:
    return not (isinstance(value, str) and value.startswith(MARK))


def _read(marked: str) -> Any:
    """Read a text of the command line as YAML, unless it is a mapping or a list without brackets."""
    text = marked.removeprefix(MARK)
    try:
        value = get_loader("yaml")(text) if text.strip() else text
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text
    return text if isinstance(value, dict | list) and not text.lstrip().startswith(("{", "[")) else value


register_type(TemplateArgument, serializer=lambda value: value, deserializer=_read, type_check=_is_final)
