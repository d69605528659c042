"""Files and folders that settings name, and digests that change with them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
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


def file_digests(paths: Iterable[Path]) -> dict[str, str]:
    """Return a digest of each file and folder, and of those that config files among them name, by path.

    The digest of a file is that of its content. That of a folder, or of a large file, is one of names, sizes and times.
    """
    pending, digests = list(paths), dict[Path, str]()
    while pending:
        path = pending.pop()
        if path not in digests:
            digests[path], content = _read_folder(path) if path.is_dir() else _read_file(path)
            pending += paths_in_value("", content, path.parent)
    return {str(path): digests[path] for path in sorted(digests)}


def names_and_digests(digests: Mapping[str, str]) -> list[str]:
    """Return the digests with the names of their files. They are the same if all files are in another folder."""
    return sorted(f"{Path(path).name} {digest}" for path, digest in digests.items())


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


def _read_folder(path: Path) -> tuple[str, None]:
    return files_fingerprint(path.rglob("*"), path), None


def _read_file(path: Path) -> tuple[str, Any]:
    size, time = (stat := path.stat()).st_size, stat.st_mtime_ns
    if size > LARGE_FILE_BYTES:
        return files_fingerprint([path], path.parent), None
    return _read_content(path, size, time)


@cache
def _read_content(path: Path, size: int, time: int) -> tuple[str, Any]:
    """Return the digest of a file of this size and time, and the content of a config file. Others have none here."""
    content = None
    if path.name.endswith(YAML_ENDINGS):
        with suppress(ConfigError):  # YAML with tags of its own
            content = read_yaml(path, _Loader)
    return digest_of(path), content


class _Loader(LOADER):
    """Loader of config files and of lm-eval's tasks."""


def _file_of_function(loader: Any, node: yaml.ScalarNode) -> str:
    """Return the file of a function, for lm-eval's tag `!function MODULE.NAME`."""
    return f"{str(node.value).rpartition('.')[0]}.py"


_Loader.add_constructor("!function", _file_of_function)
