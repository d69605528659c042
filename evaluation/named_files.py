"""Files and folders that settings name, and descriptions that change with them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.integrity import digest_of
from lpc_lightning.files.yaml_files import LOADER, read_yaml
from lpc_lightning.inference.fingerprint import files_fingerprint

OUTPUT_SETTINGS = ("default_root_dir", "cache_dir", "dirpath", "save_dir", "logger")
"""Settings with paths that a run writes to. They do not change its results."""
LARGE_FILE_BYTES = 2**26
"""Size above which a file is identified by name, size and time, not by content."""
YAML_ENDINGS = ("yaml", "yml")
"""Ends of names of config files. Templates of lm-eval's tasks are named `_template_yaml`."""


def describe_files(paths: Iterable[Path]) -> list[str]:
    """Return a description of each file and folder, and of those that config files among them name.

    A file is described by its content, a folder by the names, sizes and times of all files in it.
    """
    pending, descriptions = list(paths), dict[Path, str]()
    while pending:
        path = pending.pop()
        if path not in descriptions:
            descriptions[path], content = _describe_folder(path) if path.is_dir() else _describe_file(path)
            pending += paths_in_value("", content, path.parent)
    return sorted(descriptions.values())


def paths_in_value(key: str, value: Any, folder: Path) -> Iterator[Path]:
    """Yield the existing files and folders that a value names.

    Args:
        key: Name of the setting. A `path` may be a pattern. Settings with outputs name nothing.
        value: The value: a text, or a list or mapping of values.
        folder: Folder that paths may be relative to, besides the working directory.
    """
    if key in OUTPUT_SETTINGS:
        return
    if isinstance(value, dict):
        for name, entry in value.items():
            # Names in a `path` are those of splits.
            yield from paths_in_value("path" if key == "path" else str(name), entry, folder)
    elif isinstance(value, list):
        for entry in value:
            yield from paths_in_value(key, entry, folder)
    elif isinstance(value, str):
        expanded = os.path.expanduser(os.path.expandvars(value))
        for path in {str(folder / expanded), expanded} if expanded else ():
            if os.path.isfile(path) or os.path.isdir(path):
                yield Path(path).resolve()
            elif key == "path" and glob.has_magic(path):
                yield from (Path(each).resolve() for each in glob.iglob(path, recursive=True))


def _describe_folder(path: Path) -> tuple[str, None]:
    return f"{path} {files_fingerprint(path.rglob('*'))}", None


def _describe_file(path: Path) -> tuple[str, Any]:
    size, time = (stat := path.stat()).st_size, stat.st_mtime_ns
    return (f"{path} {files_fingerprint([path])}", None) if size > LARGE_FILE_BYTES else _read_file(path, size, time)


@cache
def _read_file(path: Path, size: int, time: int) -> tuple[str, Any]:
    """Return a description of a file of this size and time, and the content of a config file. Others have none here."""
    content = None
    if path.name.endswith(YAML_ENDINGS):
        with suppress(ConfigError):  # YAML with tags of its own
            content = read_yaml(path, _Loader)
    return f"{path.name} {digest_of(path)}", content


class _Loader(LOADER):
    """Loader of config files and of lm-eval's tasks."""


def _file_of_function(loader: Any, node: yaml.ScalarNode) -> str:
    """Return the file of a function, for lm-eval's tag `!function MODULE.NAME`."""
    return f"{str(node.value).rpartition('.')[0]}.py"


_Loader.add_constructor("!function", _file_of_function)
