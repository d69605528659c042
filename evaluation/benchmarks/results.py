"""What benchmarks yield, on disk: `results.json`, and `items.jsonl` with one line an item."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = "results.json"
ITEMS = "items.jsonl"


@dataclass(frozen=True)
class BenchmarkResults:
    """Scores of one model on several tasks."""

    metrics: dict[str, dict[str, float]]
    """By task, by lm-eval's names: `acc`, `acc_stderr`, `exact_match,strict-match`. A group of tasks has an entry too
    where lm-eval knows a score for it."""
    items: list[dict[str, Any]]
    """One per document: `task`, `doc_id`, `doc_hash`, `metrics` (by the names above) and `response`, what was answered:
    a text, or the log-probability of each choice."""
    failures: dict[str, str]
    """By task, why it has no scores."""
    record: dict[str, Any] = field(default_factory=dict)
    """How the scores were made: settings, seeds, task versions, package versions, git revision, seconds."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What was evaluated; known once the results were written."""


def stderr_name(metric: str) -> str:
    """The name of a metric's standard error: `acc_stderr`, `exact_match_stderr,strict-match`."""
    name, comma, variant = metric.partition(",")
    return f"{name}_stderr{comma}{variant}"


def scores(metrics: Mapping[str, float]) -> dict[str, tuple[float, float | None]]:
    """A task's metrics without the standard errors among them, each as (value, standard error or None)."""
    errors = {stderr_name(name) for name in metrics}
    return {name: (value, metrics.get(stderr_name(name))) for name, value in metrics.items() if name not in errors}


def write_results(folder: Path, results: BenchmarkResults, origin: Mapping[str, Any]) -> Path:
    """Write both files, each whole or not at all; `results.json` last.

    Args:
        folder: Made if it is not there.
        results: What to write.
        origin: What was evaluated, as JSON values.

    Returns:
        The path of `results.json`. It is strict JSON: what is no finite number is null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(folder / ITEMS, (_json(item) + "\n" for item in results.items))
    whole = {"origin": origin, "metrics": results.metrics, "failures": results.failures, **results.record}
    path = folder / RESULTS
    _write_whole(path, [_json(whole, indent=1), "\n"])
    return path


def read_results(folder: Path) -> BenchmarkResults:
    """Read what `write_results` wrote. A metric that is null is NaN again."""
    whole = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    with (folder / ITEMS).open(encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    for item in items:
        item["metrics"] = _numbers(item["metrics"])
    metrics = {task: _numbers(found) for task, found in whole.pop("metrics").items()}
    origin, failures = whole.pop("origin"), whole.pop("failures")
    return BenchmarkResults(metrics, items, failures, record=whole, origin=origin)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _write_whole(path: Path, pieces: Iterable[str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Half a surrogate pair, which UTF-8 cannot hold, becomes the escape that JSON has for it.
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Anything as strict JSON values: what is no finite number becomes None, what JSON does not know its text."""
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case np.generic() | np.ndarray() | torch.Tensor():
            return plain(value.tolist())
        case Mapping():
            return {str(key): plain(entry) for key, entry in value.items()}
        case list() | tuple() | set():
            return [plain(entry) for entry in value]
    return str(value)
