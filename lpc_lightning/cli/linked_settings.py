"""Check of settings of one group that another group fills.

`PreferenceCLI` links them. The parser would replace a value of their own without a word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.yaml_files import parse_yaml, read_yaml

LINKED = {"trainer": ("callbacks",), "model": ("policy", "latent")}
"""Settings of a group that are filled by the group with their own name."""


def check_linked_option(option: str, text: str) -> None:
    """Check that an option of the command line sets no linked setting.

    Args:
        option: The option, as `--trainer.callbacks+`.
        text: Its value.

    Raises:
        ConfigError: It sets one, in its own name or in a value in braces.
    """
    name = option.removeprefix("--").replace(".init_args.", ".")
    for owner, settings in LINKED.items():
        if name == owner and text.startswith("{"):
            _check_settings(parse_yaml(text, option), owner, option)
        for setting in settings:
            rest = name.removeprefix(f"{owner}.{setting}")
            if rest != name and rest[:1] in ("", ".", "+"):
                raise ConfigError(
                    f"{option}: found {text}, expected no value: the group {setting} fills this setting. Give it as "
                    f"`--{setting}{rest}={text}`."
                )


def check_linked_file(path: Path, content: Any, group: str = "") -> None:
    """Check that a config file sets no linked setting.

    Args:
        path: The file.
        content: Its content.
        group: Group of the file. "": the settings of a run, each group of which may be another file.

    Raises:
        ConfigError: It sets one.
    """
    if group:
        _check_settings(content, group, str(path))
        return
    for owner in LINKED:
        held, place = content.get(owner) if isinstance(content, dict) else None, path
        if isinstance(held, str) and (path.parent / held).is_file():
            place = path.parent / held
            held = read_yaml(place)
        _check_settings(held, owner, str(place))


def _check_settings(content: Any, owner: str, place: str) -> None:
    """Check the settings of a group. null sets nothing."""
    if not isinstance(content, dict):
        return
    of_class = content.get("init_args")
    settings = content | (of_class if isinstance(of_class, dict) else {})
    for name in LINKED.get(owner, ()):
        if settings.get(name) is not None:
            raise ConfigError(
                f"{owner}.{name}: found a value in {place}, expected none: the group {name} fills this setting. Give "
                f"it as `{name}`: in a file of a run beside `{owner}`, or as `--{name} FILE`."
            )
