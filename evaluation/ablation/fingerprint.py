"""Fingerprints of cells, from their arguments, the files that the arguments name, and the code.

A finished cell is stale if its fingerprint has changed.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.axes import parse_value
from lpc_lightning.evaluation.provenance import package_versions
from lpc_lightning.inference.fingerprint import fingerprint as fingerprint_of_files
from lpc_lightning.yaml_files import SUFFIXES, read_yaml

OUTPUT_SETTINGS = ("default_root_dir", "cache_dir", "dirpath", "save_dir", "logger")
"""Settings with paths that a run writes to. They do not change its results."""
LARGE_FILE_BYTES = 2**26
"""Size above which a file is identified by name, size and time, not by content."""


def fingerprint(arguments: Sequence[str], weights: str) -> str:
    """Return a text that changes if anything changes that may affect a cell's results.

    Args:
        arguments: Arguments of `fit`. A named file is identified by its content, and so are the files named in a config
            file, and those that match the pattern of a `path`. A named folder (a model, an adapter, a saved data set)
            is identified by the names, sizes and times of all files in it.
        weights: Weights that are evaluated.
    """
    content = [list(arguments), weights, _describe_files(arguments), code_version()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


@cache
def code_version() -> str:
    """Return a hash of this project's code that a cell may import, and of the versions of the packages it uses."""
    package = _package("lpc_lightning")
    # In a repository, callbacks/ and evaluation/ are symbolic links. `rglob` does not follow them.
    files = {*package.rglob("*.py"), *(package / "callbacks").rglob("*.py")} - {*(package / "evaluation").rglob("*.py")}
    files.add(package / "evaluation" / "ablation" / "cell_run.py")
    pending = list(files)
    while pending:
        imported = {
            path for name in _imports(pending.pop()) if (path := _evaluation_module(name)) and path not in files
        }
        files |= imported
        pending += imported
    digest = hashlib.sha256(json.dumps(package_versions(), sort_keys=True).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # each may be a module


def _evaluation_module(name: str) -> Path | None:
    """Return the file of a module in `evaluation`, or None for other modules.

    Most modules in `evaluation` read the files of finished runs and do not affect a cell. Only those imported by a cell
    count.
    """
    if not name.startswith("lpc_lightning.evaluation."):
        return None
    path = _package("lpc_lightning").joinpath(*name.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None


def _describe_files(arguments: Sequence[str]) -> list[str]:
    """Return a description of each file and folder that arguments and their config files name."""
    pending, descriptions = [path for argument in arguments for path in _paths_in_argument(argument)], dict[Path, str]()
    while pending:
        path = pending.pop()
        if path not in descriptions:
            descriptions[path], content = _describe_folder(path) if path.is_dir() else _describe_file(path)
            pending += _paths_in_value("", content, path.parent)
    return sorted(descriptions.values())


def _describe_folder(path: Path) -> tuple[str, None]:
    return f"{path} {fingerprint_of_files(path.rglob('*'))}", None


@cache
def _describe_file(path: Path) -> tuple[str, Any]:
    """Return a description of a file, and the content of a config file. Other files have no content here."""
    if path.stat().st_size > LARGE_FILE_BYTES:
        return f"{path} {fingerprint_of_files([path])}", None
    content = None
    if path.suffix in SUFFIXES:
        with suppress(ConfigError):  # a file of lm-eval may have tags that are not read here
            content = read_yaml(path)
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}", content


def _paths_in_argument(argument: str) -> Iterator[Path]:
    """Yield the files and folders that an argument names."""
    option, _, value = argument.removeprefix("--").partition("=")
    keys = option.removesuffix("+").split(".")
    content = parse_value(value)
    if content is not None and not set(keys) & set(OUTPUT_SETTINGS):
        # A number may be the name of a folder.
        yield from _paths_in_value(keys[-1], content if isinstance(content, dict | list) else value, Path())


def _paths_in_value(key: str, value: Any, folder: Path) -> Iterator[Path]:
    """Yield the existing files and folders that a value names, relative to a folder or to the working directory."""
    if isinstance(value, dict) and key not in OUTPUT_SETTINGS:
        for name, entry in value.items():
            # Names in a `path` are those of splits.
            yield from _paths_in_value("path" if key == "path" else str(name), entry, folder)
    elif isinstance(value, list):
        for entry in value:
            yield from _paths_in_value(key, entry, folder)
    elif isinstance(value, str) and key not in OUTPUT_SETTINGS:
        expanded = os.path.expanduser(os.path.expandvars(value))
        for path in {str(folder / expanded), expanded} if expanded else ():
            if os.path.isfile(path) or os.path.isdir(path):
                yield Path(path).resolve()
            elif key == "path" and glob.has_magic(path):
                yield from (Path(each).resolve() for each in glob.iglob(path, recursive=True))
