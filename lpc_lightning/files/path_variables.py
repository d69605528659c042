"""Paths with environment variables, such as `${LPC_DATA_DIR}/preferences/pairs.jsonl`."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from lpc_lightning.errors import ConfigError

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


def expand_path(path: str, setting: str) -> str:
    """Replace environment variables in a path. Paths and hub names without variables are returned unchanged.

    Args:
        path: A file, a pattern of files, a folder or a hub name.
        setting: Name of the setting, for the error.

    Raises:
        ConfigError: A variable is not set, or the file or folder does not exist. The files of a pattern are not looked
            up.
    """
    names = [braced or bare for braced, bare in _VARIABLE.findall(path)]
    if not names:
        return path
    missing = [name for name in names if not os.environ.get(name)]
    expanded = path if missing else os.path.expandvars(path)
    if not missing and (Path(expanded).expanduser().exists() or glob.has_magic(expanded)):
        return expanded
    fault = f"but {missing[0]} is not set" if missing else f"which is {expanded}, and no such file or folder exists"
    rest = _VARIABLE.sub("", path).strip("/") or "the data"
    raise ConfigError(
        f"{setting}: found {path}, {fault}. Set {names[0]} to the folder that holds {rest}, or set {setting} to "
        "another file or a hub name. The files do not come with the project: docs/data.md explains where to get them. "
        "`lpc-lightning prepare --pairs pairs.jsonl` writes a sample of the built-in pairs."
    )
