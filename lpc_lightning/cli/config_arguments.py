"""Check of config files and groups on a command line, before the parser reads them.

The parser's own error does not name the group of a file, and it does not end for a file that refers to itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.cli.linked_settings import check_linked_file, check_linked_option
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.errors import ConfigError
from lpc_lightning.files.yaml_files import SUFFIXES, check_value, check_yaml, parse_yaml, read_yaml
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy import PolicySpec

BASES: dict[str, type] = {
    "policy": PolicySpec,
    "latent": LatentSpace,
    "model": PreferenceModule,
    "data": PreferenceDataModule,
    "callbacks": Callback,
    "trainer.logger": Logger,
}
"""Base class of the classes of a group."""
GROUPS = ("policy", "latent", "model", "data", "callbacks", "trainer")
"""Groups that may be a file."""
EMPTY = {"latent": "--latent MarginalSpace", "callbacks": "--callbacks+=LabelFlipNoise"}
"""Groups that have no class unless one is given, with a way to give it."""
NULL = ("", "null", "None", "~")
LONGEST_PATH = 4096
"""Characters of a path at most."""


def check_config_arguments(arguments: Sequence[str], takes_groups: bool) -> None:
    """Check that files exist and are plain YAML of the right group, and that settings of a group have a class.

    Args:
        arguments: What follows the command.
        takes_groups: Whether the command takes a run's groups. For other commands these are other options:
            `generate --model` is a checkpoint.

    Raises:
        ConfigError: A file does not exist, is no plain YAML or belongs to another group, a value of `trainer` or
            `callbacks` is no file, a setting belongs to a group without a class, another group fills it, or a later
            value of its group replaces it.
    """
    filled: set[str] = set()
    for argument, following in pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        text = value if equals else following
        group = option.removeprefix("--").removesuffix("+") if option.startswith("--") else ""
        is_config = option in ("-c", "--config")
        if takes_groups and option.startswith("--"):
            check_linked_option(option, text)
        if not is_config and not (takes_groups and group in GROUPS):
            if takes_groups:
                _check_filled(option, filled)
            if option.startswith("--") and "." in option:
                check_value(text, option)
            continue
        if _is_file(text):
            check_yaml(Path(text))
            content = read_yaml(Path(text))
            if takes_groups:
                _check_group(option, "" if is_config else group, text, content)
                check_linked_file(Path(text), content, "" if is_config else group)
            if is_config or group != "callbacks":
                _check_names(option, text, content, may_be_value=not is_config)
        else:
            content = {}
            _check_text(option, group, text)
        given = content if is_config and isinstance(content, dict) else {group: None if text in NULL else text}
        for name in set(EMPTY) & set(given):
            (filled.discard if given[name] is None else filled.add)(name)
    _check_order(arguments if takes_groups else ())


def _check_order(arguments: Sequence[str]) -> None:
    """Check that no value replaces what an earlier option has set, unless the option is given again after it."""
    options = [argument.partition("=") for argument in arguments]
    for place, ((option, equals, value), following) in enumerate(zip(options, [*arguments[1:], ""], strict=False)):
        text = value if equals else following
        names = _replaced(option, text)
        again = {given for given, *_ in options[place:] if not given.endswith("+")}
        earlier = [given for given, *_ in options[:place] if given.startswith("--") and not given.endswith(".help")]
        for given in reversed(earlier):
            name = next((name for name in names if given not in again and _sets_part(given, name)), None)
            if name is not None:
                raise ConfigError(
                    f"{option}: found {text} after {given}, expected it before, because it replaces "
                    f"{name.removesuffix('+')}. Give {option} first."
                )


def _replaced(option: str, text: str) -> list[str]:
    """Return the names of what a value replaces. A + at the end: only the list to which entries were added.

    A class replaces nothing: settings that have been given before it are those of the class.
    """
    group = option.removeprefix("--")
    is_config = option in ("-c", "--config")
    if option == "--callbacks":
        return ["callbacks"]
    if not is_config and not (option.startswith("--") and group in {*GROUPS, *BASES}):
        return []
    content = read_yaml(Path(text)) if _is_file(text) else parse_yaml(text, option)
    if is_config:
        return list(content) if isinstance(content, dict) else []
    names = ["trainer.logger+"] if group == "trainer.logger" else []
    if isinstance(content, list):
        return [group]
    if isinstance(content, dict):
        of_class = content.get("init_args")
        settings = content | (of_class if isinstance(of_class, dict) else {})
        names += [f"{group}.{name}" for name in settings]
    return names


def _sets_part(option: str, name: str) -> bool:
    """Return whether an option sets a setting or a part of it."""
    given = option.removeprefix("--").replace(".init_args.", ".")
    return given.startswith(name) and given[len(name) : len(name) + 1] in ("", ".", "+")


def _is_file(text: str) -> bool:
    return len(text) < LONGEST_PATH and Path(text).is_file()


def _check_text(option: str, group: str, text: str) -> None:
    """Check a value that is no file."""
    if text.endswith(SUFFIXES) or (group not in GROUPS and not set("{:") & set(text)):
        found = f"the folder {text}" if Path(text).is_dir() else f"no file {text}"
        found = f"{found} in {Path.cwd()}, expected a YAML file" if text else "no file, expected a YAML file after it"
        raise ConfigError(f"{option}: found {found}. `lpc-lightning configs` writes those that come with the package.")
    check_value(text, option)
    if text in NULL or text.startswith(("-", "{", "[")):
        return
    if group == "trainer":
        raise ConfigError(
            f"trainer: found {text}, expected a file such as configs/trainer/cpu.yaml. Single settings have their "
            "names: `--trainer.accelerator cpu`."
        )
    if group == "callbacks" and not option.endswith("+"):
        raise ConfigError(f"callbacks: found {text}, expected a file or null. `--callbacks+={text}` adds one.")


def _check_names(option: str, path: str, content: Any, may_be_value: bool) -> None:
    """Check that a file holds settings by name. That of a group may hold null, or another value for the parser."""
    if isinstance(content, dict) or (may_be_value and not isinstance(content, list)):
        return
    found = "a list" if isinstance(content, list) else "nothing" if content is None else f"the value {content!r}"
    raise ConfigError(f"{option}: found {found} in {path}, expected settings by name, as in `NAME: VALUE`.")


def _check_group(option: str, group: str, path: str, content: Any) -> None:
    """Check that a file belongs to a group, or holds the settings of a run (group "")."""
    found = _group_of(content)
    if found is not None and found != group:
        expected = f"one of group {group}" if group else "the settings of a run, such as configs/experiment/tiny.yaml"
        raise ConfigError(
            f"{option}: found {path}, which is a file of group {found}, expected {expected}. Give it as "
            f"`--{found} {path}`."
        )


def _group_of(content: Any) -> str | None:
    """Return the group of a file, or None if it is not known."""
    if isinstance(content, list):
        return "callbacks" if content and all(_group_of(each) == "callbacks" for each in content) else None
    if not isinstance(content, dict) or not content:
        return None
    if "class_path" not in content:
        return "trainer" if set(content) <= set(inspect.signature(Trainer).parameters) else None
    try:
        kind = resolve_name(content["class_path"])
    except (ImportError, AttributeError, ValueError, TypeError):
        return None  # the parser says why
    return next((name for name, base in BASES.items() if isinstance(kind, type) and issubclass(kind, base)), None)


def _check_filled(option: str, filled: set[str]) -> None:
    """Check that a group has a class to which a single setting can belong."""
    group, _, setting = option.removeprefix("--").partition(".")
    if option.startswith("--") and setting not in ("", "help") and group in EMPTY and group not in filled:
        raise ConfigError(f"{group}: found no class for {option}, expected one before it, as in `{EMPTY[group]}`.")
