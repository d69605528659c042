"""Fingerprints of cells, from their arguments, the files that the arguments name, and the code.

A finished cell is stale if its fingerprint has changed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lpc_lightning.evaluation.provenance import package_versions
from lpc_lightning.inference.fingerprint import weights_of
from lpc_lightning.yaml_files import read_yaml

OUTPUT_SETTINGS = ("default_root_dir", "cache_dir", "dirpath", "save_dir")
"""Settings with paths that a run writes to. They do not change its results."""
LARGE_FILE_BYTES = 2**26
"""Size above which a file is identified by name, size and time, not by content."""


def fingerprint(arguments: Sequence[str], weights: str) -> str:
    """Return a text that changes if anything changes that may affect a cell's results.

    Args:
        arguments: Arguments of `fit`. A named file is identified by its content, and so are the files named in a config
            file. A named folder (a model, a saved data set) is identified by the names, sizes and times of its files.
        weights: Weights that are evaluated.
    """
    files = sorted({description for argument in arguments for description in _files_in_argument(argument)})
    return hashlib.sha256(json.dumps([list(arguments), weights, files, code_version()]).encode()).hexdigest()[:16]


@cache
def code_version() -> str:
    """Return a hash of this project's code that a fit may import, and of the versions of the packages it uses."""
    package = _package("lpc_lightning")
    # In a repository, callbacks/ and evaluation/ are symbolic links. `rglob` does not follow them.
    files = {*package.rglob("*.py"), *(package / "callbacks").rglob("*.py")} - {*(package / "evaluation").rglob("*.py")}
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
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _evaluation_module(name: str) -> Path | None:
    """Return the file of a module in `evaluation`, or None for other modules.

    Most modules in `evaluation` read the files of finished runs and do not affect a fit. Only those imported by a fit
    count.
    """
    if not name.startswith("lpc_lightning.evaluation."):
        return None
    path = _package("lpc_lightning").joinpath(*name.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None


def _files_in_argument(argument: str) -> Iterator[str]:
    """Yield a description of each file that an argument names. The description changes with the file."""
    key, _, value = argument.removeprefix("--").rpartition("=")
    yield from _files_in_value(key.rpartition(".")[2].rstrip("+"), value, Path())


def _files_in_value(key: str, value: Any, folder: Path) -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _files_in_value(str(name), entry, folder)
    elif isinstance(value, list):
        for entry in value:
            yield from _files_in_value(key, entry, folder)
    elif isinstance(value, str) and value and len(value) < 1000 and "\n" not in value and key not in OUTPUT_SETTINGS:
        expanded = os.path.expandvars(value)
        for path in {folder / expanded, Path(expanded)}:
            if path.is_file():
                yield from _describe_file(path.resolve())
            elif key == "path" and path.is_dir():
                yield f"{path.resolve()} {weights_of(str(path))}"


@cache
def _describe_file(path: Path) -> tuple[str, ...]:
    if path.stat().st_size > LARGE_FILE_BYTES:
        return (f"{path} {weights_of(str(path))}",)
    description = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    if path.suffix not in (".yaml", ".yml"):
        return (description,)
    content = read_yaml(path)
    return description, *_files_in_value("", content, path.parent)
