"""Whether a finished cell is still the one that is asked for: by its arguments, the files behind them, and the code."""

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

import yaml

from lpc_lightning.evaluation.provenance import package_versions
from lpc_lightning.inference.fingerprint import weights_of

WRITTEN = ("default_root_dir", "cache_dir", "dirpath", "save_dir")
"""Settings that name what a run writes."""
LARGE = 2**26
"""Bytes from which on a file is known by name, size and time."""


def fingerprint(arguments: Sequence[str], weights: str) -> str:
    """A text that changes with anything that may change a cell's results.

    Args:
        arguments: Arguments of `fit`. Files that they name count by content, those named in these config files as well;
            a folder (a model, a saved data set) by the names, sizes and times of its files.
        weights: Which weights are evaluated.
    """
    files = sorted({told for argument in arguments for told in _named(argument)})
    return hashlib.sha256(json.dumps([list(arguments), weights, files, code_version()]).encode()).hexdigest()[:16]


@cache
def code_version() -> str:
    """The source of what a fit may import from this project, and the versions of the packages below it."""
    package = _package("lpc_lightning")
    # In a checkout, callbacks/ and evaluation/ are links, which `rglob` does not follow.
    files = {*package.rglob("*.py"), *(package / "callbacks").rglob("*.py")} - {*(package / "evaluation").rglob("*.py")}
    pending = list(files)
    while pending:
        found = {path for name in _imports(pending.pop()) if (path := _evaluation_module(name)) and path not in files}
        files |= found
        pending += found
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
    """The file of a module of `evaluation`, which mostly reads what runs have written and is no part of them."""
    if not name.startswith("lpc_lightning.evaluation."):
        return None
    path = _package("lpc_lightning").joinpath(*name.split(".")[1:]).with_suffix(".py")
    return path if path.is_file() else None


def _named(argument: str) -> Iterator[str]:
    """The files that an argument names, with what tells whether they have changed."""
    key, _, value = argument.removeprefix("--").rpartition("=")
    yield from _files(key.rpartition(".")[2].rstrip("+"), value, Path())


def _files(key: str, value: Any, folder: Path) -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _files(str(name), entry, folder)
    elif isinstance(value, list):
        for entry in value:
            yield from _files(key, entry, folder)
    elif isinstance(value, str) and value and len(value) < 1000 and "\n" not in value and key not in WRITTEN:
        expanded = os.path.expandvars(value)
        for path in {folder / expanded, Path(expanded)}:
            if path.is_file():
                yield from _file(path.resolve())
            elif key == "path" and path.is_dir():
                yield f"{path.resolve()} {weights_of(str(path))}"


@cache
def _file(path: Path) -> tuple[str, ...]:
    if path.stat().st_size > LARGE:
        return (f"{path} {weights_of(str(path))}",)
    told = f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"
    if path.suffix not in (".yaml", ".yml"):
        return (told,)
    return told, *_files("", yaml.safe_load(path.read_text(encoding="utf-8")), path.parent)
