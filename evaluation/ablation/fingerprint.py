"""Fingerprints of cells, from their arguments, the files that the arguments name, and the code.

A finished cell is stale if its fingerprint has changed.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lpc_lightning.evaluation.ablation.grids.axes import parse_value
from lpc_lightning.evaluation.named_files import OUTPUT_SETTINGS, file_digests, names_and_digests, paths_in_value
from lpc_lightning.evaluation.provenance import package_versions


def cell_fingerprint(arguments: Sequence[str], weights: str, files: Mapping[str, str], code: str) -> str:
    """Return a text that changes if anything changes that may affect a cell's results.

    Args:
        arguments: Arguments of `fit`.
        weights: Weights that are evaluated.
        files: Digests of the files that the arguments name; see `digests_in_arguments`.
        code: Hash of the code; see `code_version`. The versions of packages are added to it.
    """
    content = [list(arguments), weights, names_and_digests(files), code, package_versions()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def digests_in_arguments(arguments: Sequence[str]) -> dict[str, str]:
    """Return the digests of the files and folders that arguments of `fit` name, by path.

    A named file is identified by its content, and so are the files named in a config file, and those that match the
    pattern of a `path`. A named folder (a model, an adapter, a saved data set) is identified by the names, sizes and
    times of all files in it.
    """
    return file_digests(path for argument in arguments for path in _paths_in_argument(argument))


@cache
def code_version() -> str:
    """Return a hash of this project's code that a cell may import."""
    package = _package("lpc_lightning")
    # In a repository, callbacks/ and evaluation/ are symbolic links. `rglob` does not follow them.
    files = {*package.rglob("*.py"), *(package / "callbacks").rglob("*.py")} - {*(package / "evaluation").rglob("*.py")}
    files.add(package / "evaluation" / "ablation" / "cells" / "cell_run.py")
    pending = list(files)
    while pending:
        imported = {
            path for name in _imports(pending.pop()) if (path := _evaluation_module(name)) and path not in files
        }
        files |= imported
        pending += imported
    digest = hashlib.sha256()
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


def _paths_in_argument(argument: str) -> Iterator[Path]:
    """Yield the files and folders that an argument names."""
    option, _, value = argument.removeprefix("--").partition("=")
    keys = option.removesuffix("+").split(".")
    content = parse_value(value)
    if content is not None and not set(keys) & set(OUTPUT_SETTINGS):
        # A number may be the name of a folder.
        yield from paths_in_value(keys[-1], content if isinstance(content, dict | list) else value, Path())
