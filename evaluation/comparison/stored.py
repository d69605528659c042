"""Stored results: finding those with the same settings, and adding new results to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lpc_lightning.data import DataError
from lpc_lightning.evaluation.benchmarks.results import RESULTS, BenchmarkResults, read_results, to_json_value
from lpc_lightning.evaluation.benchmarks.tasks import LOCAL_DATA, is_task_file, task_file_version
from lpc_lightning.inference.fingerprint import files_fingerprint

REQUEST = "request"
"""Key of the evaluation's settings in the origin in `results.json`; see `EvalRequest.key`."""


def holds_results(path: str) -> bool:
    """Return True if a path is a folder of results, and not a model folder that also has results."""
    folder = Path(path)
    return (folder / RESULTS).is_file() and not (folder / "config.json").is_file()


def read_stored(folder: Path) -> BenchmarkResults:
    """Read the results in a folder.

    Raises:
        DataError: The results cannot be read.
    """
    try:
        return read_results(folder)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder}: found incomplete results ({type(error).__name__}: {error}), expected the files of an earlier "
            "run. Remove the folder, or use another --output."
        ) from error


@contextmanager
def claim_folder(
    output: Path, name: str, key: Mapping[str, Any], versions: Mapping[str, str]
) -> Iterator[tuple[Path, BenchmarkResults | None]]:
    """Yield the folder for a model's results under these settings, and the results in it, if any.

    The folder is `name`. If that folder has results with other settings, of another model or of other pairs, or if
    another command is writing to it, it is `name-2`, and so on.

    Args:
        output: Folder with one subfolder per model.
        name: Name of the model.
        key: Settings of the evaluation; see `EvalRequest.key`.
        versions: By task, the version of the preference pairs to score; see `PairsFile.content`.
    """
    for number in count(1):
        folder = output / (name if number == 1 else f"{name}-{number}")
        lock = FileLock(output / f".{folder.name}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        try:
            results = read_stored(folder) if (folder / RESULTS).is_file() else None
            if results is None or results.origin.get(REQUEST) == to_json_value(key):
                if not (kept := _of_other_pairs(results, versions)):
                    yield folder, results
                    return
                print(f"{folder} keeps its results of {', '.join(kept)}: they are of other pairs, or other settings.")
        finally:
            lock.release()


def _of_other_pairs(results: BenchmarkResults | None, versions: Mapping[str, str]) -> list[str]:
    """Return the tasks of preference pairs whose stored results are of another version."""
    records = {} if results is None else results.record["tasks"]
    return [task for task, version in versions.items() if task in records and records[task]["version"] != version]


@contextmanager
def claim_name(output: Path, name: str, is_free: Callable[[str], bool]) -> Iterator[str]:
    """Yield a name for files in a folder: `name`, or `name-2` and so on if that name is taken.

    Args:
        output: The folder. It is made.
        name: The name without its ending.
        is_free: Function that returns False for a name whose files must stay. Names of files that another command
            writes are taken, too.
    """
    output.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        free = name if number == 1 else f"{name}-{number}"
        lock = FileLock(output / f".{free}.md.lock", timeout=0)
        try:
            with lock:
                if is_free(free):
                    yield free
                    return
        except Timeout:
            continue


def local_data(data_dir: str | None) -> str | None:
    """Return a fingerprint of the benchmarks' local files, or None if the data comes from the hub."""
    if data_dir is None:
        return None
    folder = Path(data_dir)
    return files_fingerprint((file for data in LOCAL_DATA.values() for file in data.files(folder).values()), folder)


def missing_tasks(stored: BenchmarkResults | None, tasks: Sequence[str]) -> list[str]:
    """Return the tasks without results: those that failed, were not part of a run, or whose task file has changed.

    A task file is found by its content, whatever its path.
    """
    if stored is None:
        return list(tasks)
    stored_tasks = stored.record["settings"]["tasks"]
    task_files = {record.get("task_file") for record in stored.record["tasks"].values()}
    # If a group fails, the failures have the names of its tasks.
    has_failed_group = bool(set(stored.failures) - set(stored_tasks))

    def is_missing(task: str) -> bool:
        is_stored = task_file_version(task) in task_files if is_task_file(task) else task in stored_tasks
        if is_task_file(task) and not is_stored:
            return True
        is_incomplete = not is_stored or task in stored.failures or has_failed_group
        return task not in stored.metrics and is_incomplete

    return [task for task in tasks if is_missing(task)]


def merge_parts(old: BenchmarkResults | None, new: BenchmarkResults) -> BenchmarkResults:
    """Merge two parts of a run. If both have a task, the new one is used."""
    if old is None:
        return new
    before, after = old.record, new.record
    settings = {**before["settings"], **after["settings"]}
    settings["tasks"] = list(dict.fromkeys([*before["settings"]["tasks"], *after["settings"]["tasks"]]))
    record = {**before, **after, "settings": settings, "tasks": before["tasks"] | after["tasks"]}
    record["seconds"] = round(before["seconds"] + after["seconds"], 3)
    # A task that could not be loaded failed under the name of its file, tag or group.
    repeated = {*new.metrics, *after["settings"]["tasks"]}
    return BenchmarkResults(
        metrics=old.metrics | new.metrics,
        items=[item for item in old.items if item["task"] not in after["tasks"]] + new.items,
        failures={task: reason for task, reason in old.failures.items() if task not in repeated} | new.failures,
        record=record,
        origin=old.origin,
    )


def add_run(stored: BenchmarkResults | None, new: BenchmarkResults) -> BenchmarkResults:
    """Add a run's results to stored ones. `earlier` in the record lists the earlier runs with their versions."""
    combined = merge_parts(stored, new)
    if stored is None:
        return combined
    before = stored.record
    versions = {name: before.get(name) for name in ("date", "packages", "platform", "git")}
    earlier = [*before.get("earlier", []), {"tasks": list(before["tasks"]), **versions}]
    return replace(combined, record={**combined.record, "earlier": earlier})


def split_by_documents(tasks: Sequence[str]) -> list[list[str]]:
    """Split tasks into parts that run and are written one after the other.

    Tasks about the same documents are in the same part.
    """
    parts: dict[object, list[str]] = {}
    for task in tasks:
        parts.setdefault(LOCAL_DATA.get(task, task), []).append(task)
    return list(parts.values())
