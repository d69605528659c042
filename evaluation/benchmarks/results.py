"""Benchmark results and their files: `results.json`, and `items.jsonl` with one line per item."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lpc_lightning.files.json_files import write_pieces, write_text

RESULTS = "results.json"
ITEMS = "items.jsonl"


@dataclass(frozen=True)
class BenchmarkResults:
    """Scores of one model on several tasks."""

    metrics: dict[str, dict[str, float]]
    """Metrics by task, with lm-eval's names: `acc`, `acc_stderr`, `exact_match,strict-match`. A group of tasks has an
    entry if lm-eval computes a score for it."""
    items: list[dict[str, Any]]
    """One item per document: `task`, `doc_id`, `doc_hash`, `metrics` (with the names above), and `response`. The
    response is a text, or the log-probability of each choice."""
    failures: dict[str, str]
    """Reason for missing scores, by task."""
    record: dict[str, Any] = field(default_factory=dict)
    """How the scores were computed: settings, seeds, task versions, package versions, git revision, seconds."""
    origin: dict[str, Any] = field(default_factory=dict)
    """The evaluated model. Empty until the results are written."""


def stderr_name(metric: str) -> str:
    """Return the name of a metric's standard error: `acc_stderr`, `exact_match_stderr,strict-match`."""
    name, comma, variant = metric.partition(",")
    return f"{name}_stderr{comma}{variant}"


def scores(metrics: Mapping[str, float]) -> dict[str, tuple[float, float | None]]:
    """Return each metric of a task as (value, standard error or None), without separate standard-error entries."""
    errors = {stderr_name(name) for name in metrics}
    return {name: (value, metrics.get(stderr_name(name))) for name, value in metrics.items() if name not in errors}


def write_results(folder: Path, results: BenchmarkResults, origin: Mapping[str, Any]) -> Path:
    """Write both files, `results.json` last. Each file is written completely or not at all.

    Args:
        folder: Folder of the files. It is created if needed.
        results: The results.
        origin: The evaluated model, as JSON values.

    Returns:
        The path of `results.json`. The file is strict JSON: numbers that are not finite become null. It names
        its folder, so that the evaluated run is found from there when both have been moved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_pieces(folder / ITEMS, (_json(item) + "\n" for item in results.items))
    content = {"origin": origin, "metrics": results.metrics, "failures": results.failures, **results.record}
    content["folder"] = str(folder.absolute())
    path = folder / RESULTS
    write_text(path, _json(content, indent=1) + "\n")
    return path


def read_results(folder: Path) -> BenchmarkResults:
    """Read the files of `write_results`. A metric that is null becomes NaN."""
    content = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    content.pop("folder", None)
    with (folder / ITEMS).open(encoding="utf-8") as file:
        items = [json.loads(line) for line in file]
    for item in items:
        item["metrics"] = _null_to_nan(item["metrics"])
    metrics = {task: _null_to_nan(task_metrics) for task, task_metrics in content.pop("metrics").items()}
    origin, failures = content.pop("origin"), content.pop("failures")
    return BenchmarkResults(metrics, items, failures, record=content, origin=origin)


def _null_to_nan(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(to_json_value(value), indent=indent, ensure_ascii=False, allow_nan=False)


def to_json_value(value: Any) -> Any:
    """Convert any value to strict JSON values.

    Numbers that are not finite become None. Objects without a JSON form become their text.
    """
    match value:
        case None | bool() | str() | int():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case np.generic() | np.ndarray() | torch.Tensor():
            return to_json_value(value.tolist())
        case Mapping():
            return {str(key): to_json_value(entry) for key, entry in value.items()}
        case list() | tuple() | set():
            return [to_json_value(entry) for entry in value]
    return str(value)
