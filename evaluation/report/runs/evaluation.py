"""Read benchmark results that `lpc-lightning evaluate` has written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpc_lightning.evaluation.benchmarks.results import RESULTS, scores
from lpc_lightning.evaluation.comparison.model_scores import conditions_of
from lpc_lightning.evaluation.report.runs.fit import weights_kind
from lpc_lightning.evaluation.report.runs.records import PRECISION, Loaded, Measurement, RunProvenance, numeric_metrics
from lpc_lightning.evaluation.report.runs.settings import WEIGHTS
from lpc_lightning.inference.checkpoints import run_folder


def load_evaluation(folder: Path) -> Loaded:
    """Read a model's `results.json`: the metrics of each task as `TASK/METRIC`, without standard errors.

    A run that is no longer in its place is looked for at the same relative path from the results, as after both were
    moved or copied together.
    """
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    origin = results["origin"]
    request = origin.get("request") or {}
    model = request.get("model") or origin.get("path")
    is_run = origin.get("kind") == "checkpoint" and model
    of_model: dict[str, Any] = {PRECISION: request["precision"]} if request.get("precision") else {}
    of_model |= {WEIGHTS: weights_kind(Path(model))} if is_run else {}
    by_task = conditions_of(results, results["metrics"])
    metrics: dict[str, float] = {}
    conditions: dict[str, Mapping[str, Any]] = {}
    for task, task_metrics in results["metrics"].items():
        named = {f"{task}/{name}": value for name, (value, _) in scores(numeric_metrics(task_metrics)).items()}
        metrics |= named
        conditions |= {metric: {**by_task[task], **of_model} for metric in named}
    name = str(origin.get("name") or folder.name)
    facts = {"versions": results.get("packages"), "settings": results.get("settings"), "git": results.get("git")}
    run = _find_run(run_folder(Path(model)), folder, results.get("folder")) if is_run else None
    measurement = Measurement(name, metrics, run, folder, origin.get("seed"), conditions)
    return Loaded(measurements=(measurement,), origins=(RunProvenance(f"evaluate {name}", facts=facts),))


def _find_run(run: Path, folder: Path, folder_before: str | None) -> Path:
    """Return the folder of a run: its recorded one, or if that is gone, the one in the same place from the results."""
    if run.exists() or folder_before is None:
        return run
    moved = folder / os.path.relpath(run, folder_before)
    return moved if moved.exists() else run
