"""The parser of a run's settings, with short errors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lpc_lightning.errors import ConfigError

KEY = re.compile(r'Parser key "([\w.]+)"')
NAME = re.compile(r"Expected a dot import path string: (.*)")
SUBTYPES = re.compile(r"Subtypes: \[(.*)\]")
CLASS = re.compile(r"\b(?:\w+\.)+[A-Z]\w*")
OWN = "lpc_lightning."
PLAIN = {"int": "an integer", "float": "a number", "bool": "true, false"}
"""Values that a setting may take in place of a class, by type."""


class SettingsParser(LightningArgumentParser):
    """LightningArgumentParser whose errors list the known classes, without a page of usage before them."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with an error.

        Raises:
            ConfigError: A value should be a class, and no class has this name.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        if (explanation := explain_unknown_class(message)) is not None:
            raise ConfigError(explanation) from ex
        command = getattr(ex, "subcommand_parser", None) or self
        self.exit(2, f"tip: {command.prog.replace(' [options]', '')} --help lists the settings.\nerror: {message}\n")


def explain_unknown_class(message: str) -> str | None:
    """Return a sentence with the known classes in place of the parser's text on a value that is no class.

    Args:
        message: The parser's text.

    Returns:
        None if the text is about something else.
    """
    found = NAME.search(message)
    if found is None:
        return None
    before = message[: found.start()]
    # Types of the setting itself stand behind its key, those of the setting that holds it before.
    types = SUBTYPES.search(KEY.split(before)[-1])
    bases = [] if types is None else [resolve_name(base) for base in CLASS.findall(types[1]) if "abc." not in base]
    classes = [each for base in bases for each in list(_subclasses(base)) or [base]]
    known = sorted({each.__name__ for each in classes})
    own = sorted({each.__name__ for each in classes if each.__module__.startswith(OWN)})
    plain = [PLAIN[name] for name in PLAIN if types is not None and f"<class '{name}'>" in types[1]]
    names = "".join(f"{name}, " for name in ["a file", *plain, *(own or known)])
    return (
        f"{'.'.join(KEY.findall(before))}: found {found[1]}, expected {names}or the import path of a class "
        "(`my_package.MyClass`)."
    )


def _subclasses(base: type) -> Iterator[type]:
    """Yield the subclasses that can be built, of those that are imported."""
    subclasses: list[type] = base.__subclasses__()
    for each in subclasses:
        if not inspect.isabstract(each):
            yield each
        yield from _subclasses(each)
