"""Results that are there already: found again by what was asked for, and added to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from lpc_lightning.data import DataError
from lpc_lightning.evaluation.benchmarks.results import RESULTS, BenchmarkResults, plain, read_results
from lpc_lightning.evaluation.benchmarks.tasks import LOCAL_DATA
from lpc_lightning.inference.fingerprint import fingerprint

REQUEST = "request"
"""Where the origin in `results.json` keeps what was asked for."""


def holds_results(path: str) -> bool:
    """Whether a path is a folder of results, and not a model that merely has some beside its weights."""
    folder = Path(path)
    return (folder / RESULTS).is_file() and not (folder / "config.json").is_file()


def read(folder: Path) -> BenchmarkResults:
    """The results in a folder.

    Raises:
        DataError: They cannot be read.
    """
    try:
        return read_results(folder)
    except (OSError, ValueError, KeyError) as error:
        said = f"{type(error).__name__}: {error}"
        raise DataError(f"{folder} holds no whole results ({said}). Remove it, or give another --output.") from error


def place_of(output: Path, name: str, request: Mapping[str, Any]) -> tuple[Path, BenchmarkResults | None]:
    """The folder for a model's results under these settings, and what it holds already.

    It is `name`, or `name-2` and so on where folders before it hold results of other settings or another model.
    """
    for number in count(1):
        folder = output / (name if number == 1 else f"{name}-{number}")
        if not (folder / RESULTS).is_file():
            return folder, None
        if (found := read(folder)).origin.get(REQUEST) == plain(request):
            return folder, found
    raise AssertionError("there is always a free number")


def local_data(data_dir: str | None) -> str | None:
    """The fingerprint of the benchmarks' files; None where they come from the hub."""
    if data_dir is None:
        return None
    return fingerprint(file for data in LOCAL_DATA.values() for file in data.files(Path(data_dir)).values())


def missing_tasks(stored: BenchmarkResults | None, tasks: Sequence[str]) -> list[str]:
    """Those of the tasks that have no results yet, because they were not asked for or failed."""
    if stored is None:
        return list(tasks)
    asked = stored.record["settings"]["tasks"]
    # A group fails under the names of its tasks.
    inner = set(stored.failures) - set(asked)
    return [
        task for task in tasks if task not in stored.metrics and (task not in asked or task in stored.failures or inner)
    ]


def joined(old: BenchmarkResults | None, new: BenchmarkResults) -> BenchmarkResults:
    """Two parts of a run as one. Where both have a task, the new one counts."""
    if old is None:
        return new
    before, after = old.record, new.record
    settings = {**before["settings"], **after["settings"]}
    settings["tasks"] = list(dict.fromkeys([*before["settings"]["tasks"], *after["settings"]["tasks"]]))
    record = {**before, **after, "settings": settings, "tasks": before["tasks"] | after["tasks"]}
    record["seconds"] = round(before["seconds"] + after["seconds"], 3)
    return BenchmarkResults(
        metrics=old.metrics | new.metrics,
        items=[item for item in old.items if item["task"] not in after["tasks"]] + new.items,
        failures={task: why for task, why in old.failures.items() if task not in new.metrics} | new.failures,
        record=record,
        origin=old.origin,
    )


def added(stored: BenchmarkResults | None, new: BenchmarkResults) -> BenchmarkResults:
    """A run's results with those of runs before it, each of which says in `earlier` how it was made."""
    whole = joined(stored, new)
    if stored is None:
        return whole
    before = stored.record
    made = {name: before.get(name) for name in ("date", "packages", "platform", "git")}
    earlier = [*before.get("earlier", []), {"tasks": list(before["tasks"]), **made}]
    return replace(whole, record={**whole.record, "earlier": earlier})


def apart(tasks: Sequence[str]) -> list[list[str]]:
    """Tasks that can run, and be written, one after the other; those about the same documents stay together."""
    parts: dict[object, list[str]] = {}
    for task in tasks:
        parts.setdefault(LOCAL_DATA.get(task, task), []).append(task)
    return list(parts.values())
