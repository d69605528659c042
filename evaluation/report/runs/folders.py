"""Find and read folders with results of any command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
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


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that holds results."""

    marker: str
    """Name of the file that identifies the kind."""
    description: str
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
    """Read all results in some folders and below them.

    A measurement needs the settings of its run. That run is read as well, if its folder still exists.

    Args:
        paths: Ablations, cells, run folders, results of `evaluate`, or folders that contain any of these.

    Raises:
        ConfigError: A path contains no results.
        DataError: A file cannot be read.
    """
    folders: dict[Path, FolderKind] = {}
    for path in paths:
        results = dict(_find(Path(path)))
        if not results:
            expected = "; ".join(f"{kind.description} ({kind.marker})" for kind in KINDS)
            raise ConfigError(f"runs: found no results in {path}, expected a folder that is or contains {expected}.")
        folders |= {folder.resolve(): kind for folder, kind in results.items()}
    loaded = reduce(add, (_load(kind, folder) for folder, kind in folders.items()))
    read = {record.folder.resolve() for record in loaded.records if record.folder is not None}
    measured = {measurement.run.resolve() for measurement in loaded.measurements if measurement.run is not None}
    for run in sorted(folder for folder in measured - read if (folder / CONFIG).is_file()):
        loaded += _load(CELLS, run.parent) if (run.parent / CELL).is_file() else _load(RUNS, run)
    return loaded


def _find(path: Path, above: Set[Path] = frozenset()) -> Iterator[tuple[Path, FolderKind]]:
    """Yield the folders of results at and below a path. A link to a folder above itself is not followed."""
    kind = next((kind for kind in KINDS if (path / kind.marker).is_file()), None)
    if kind is not None:
        yield path, kind
    elif path.is_dir() and (own := path.resolve()) not in above:
        for entry in sorted((entry for entry in path.iterdir() if entry.is_dir()), key=_by_number):
            yield from _find(entry, above | {own})


def _by_number(path: Path) -> tuple[str, int, str]:
    """Return a sort key that puts version_2 before version_10."""
    head, _, tail = path.name.rpartition("_")
    return (head, int(tail), "") if tail.isdecimal() else (path.name, 0, path.name)


def _load(kind: FolderKind, folder: Path) -> Loaded:
    try:
        return kind.load(folder)
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise DataError(
            f"{folder}: {kind.marker} or a file beside it cannot be read ({type(error).__name__}: {error}), expected "
            f"{kind.description}. Repair the file, or leave the folder out."
        ) from error
