"""All kinds of folders that hold results, found and read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import yaml

from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.results import RESULTS
from lpc_lightning.evaluation.report.runs.ablation import ABLATION, CELL, load_ablation, load_cell
from lpc_lightning.evaluation.report.runs.evaluation import load_evaluation
from lpc_lightning.evaluation.report.runs.fit import CONFIG, load_run
from lpc_lightning.evaluation.report.runs.records import Loaded

DEEPEST = 4
"""Folders below a given one in which runs are looked for."""


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that holds results."""

    mark: str
    """The file that it is known by."""
    about: str
    load: Callable[[Path], Loaded]


CELLS = FolderKind(CELL, "a cell of an ablation", load_cell)
RUNS = FolderKind(CONFIG, "a run of `lpc-lightning fit`", load_run)
KINDS = (
    FolderKind(ABLATION, "an ablation of `lpc-lightning ablate`", load_ablation),
    CELLS,
    RUNS,
    FolderKind(RESULTS, "results of `lpc-lightning evaluate`", load_evaluation),
)


def load_folders(paths: Sequence[str]) -> Loaded:
    """All results in some folders and below them.

    Args:
        paths: Ablations, cells, run folders, results of `evaluate`, or folders that hold any of these.

    Raises:
        ConfigError: A path at which there is nothing of the kind.
        DataError: A file that cannot be read.
    """
    found: dict[Path, FolderKind] = {}
    for path in paths:
        below = dict(_find(Path(path)))
        if not below:
            known = "; ".join(f"{kind.about} ({kind.mark})" for kind in KINDS)
            raise ConfigError(f"runs: found no results in {path}, expected a folder that is or holds {known}.")
        found |= {place.resolve(): kind for place, kind in below.items()}
    loaded = reduce(add, (_read(kind, place) for place, kind in found.items()))
    # What was measured of a run is told apart by how the run was made: read it as well, where it is still there.
    known_runs = {record.place.resolve() for record in loaded.records if record.place is not None}
    others = {each.run.resolve() for each in loaded.measured if each.run is not None} - known_runs
    for run in sorted(place for place in others if (place / CONFIG).is_file()):
        loaded += _read(CELLS, run.parent) if (run.parent / CELL).is_file() else _read(RUNS, run)
    return loaded


def _find(path: Path, depth: int = 0) -> Iterator[tuple[Path, FolderKind]]:
    kind = next((kind for kind in KINDS if (path / kind.mark).is_file()), None)
    if kind is not None:
        yield path, kind
    elif path.is_dir() and depth < DEEPEST:
        for entry in sorted((entry for entry in path.iterdir() if entry.is_dir()), key=_by_number):
            yield from _find(entry, depth + 1)


def _by_number(path: Path) -> tuple[str, int, str]:
    """version_2 before version_10."""
    head, _, tail = path.name.rpartition("_")
    return (head, int(tail), "") if tail.isdecimal() else (path.name, 0, path.name)


def _read(kind: FolderKind, place: Path) -> Loaded:
    try:
        return kind.load(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(
            f"{place}: {kind.mark} or a file beside it cannot be read ({type(error).__name__}: {error}), expected "
            f"{kind.about}. Mend it, or leave the folder out."
        ) from error
