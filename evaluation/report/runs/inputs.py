"""The files and the code of cells, so that no report compares cells of different ones without a note."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_LISTED = 3
"""Most files that a note lists."""


@dataclass(frozen=True)
class Inputs:
    """The files and the code of a cell, from its record."""

    cell: str
    """Names of the ablation's folder and of the cell."""
    started: float
    """Start time of the last attempt, in seconds since 1970."""
    files: Mapping[str, str]
    """Digest of each file and folder that the settings name, by path. Empty: there is none, or it is not recorded."""
    code: str
    """Hash of the project's code. Empty: an earlier version of the project has run the cell."""


class Difference(NamedTuple):
    """Files or code of a cell that are other ones than those of a cell that began later."""

    number: int
    """Index of the cell among the compared ones."""
    kind: str
    """`other files` or `other code`."""
    why: str
    """The files, and the cell that began later."""


def other_inputs(cells: Sequence[Inputs]) -> Iterator[Difference]:
    """Yield the cells with other files or other code than the cell that began last: at most one entry of a kind each.

    A file is compared only between cells that have it under the same path: each arm may have config files of its own.

    Args:
        cells: The cells that a report compares.
    """
    by_start = sorted(cells, key=lambda cell: cell.started)
    latest = {path: cell for cell in by_start for path in cell.files}
    for index, cell in enumerate(cells):
        changed: dict[str, list[str]] = {}
        for path, digest in cell.files.items():
            if digest != latest[path].files[path]:
                changed.setdefault(latest[path].cell, []).append(path)
        if changed:
            why = "; ".join(
                f"{_listed(paths)}: another version than in {later}, a later run" for later, paths in changed.items()
            )
            yield Difference(index, "other files", why)
        if cell.code != by_start[-1].code:
            why = f"another version of the code than in {by_start[-1].cell}, a later run"
            yield Difference(index, "other code", why)


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
    return f"{', '.join(paths[:MAX_LISTED])}{more}"
