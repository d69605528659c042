"""Results of benchmarks as `lpc-lightning evaluate` leaves them."""

from __future__ import annotations

import json
from pathlib import Path

from lpc_lightning.evaluation.benchmarks.results import RESULTS, scores
from lpc_lightning.evaluation.report.runs.records import Loaded, Measured, RunProvenance, finite
from lpc_lightning.inference.checkpoints import run_folder


def load_evaluation(folder: Path) -> Loaded:
    """`results.json` of a model: the metrics of each task as `TASK/METRIC`, without their standard errors."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    origin = results["origin"]
    metrics = {
        f"{task}/{name}": value
        for task, found in results["metrics"].items()
        for name, (value, _) in scores(finite(found)).items()
    }
    model = (origin.get("request") or {}).get("model") or origin.get("path")
    is_run = origin.get("kind") == "checkpoint" and model
    name = str(origin.get("name") or folder.name)
    facts = {"versions": results.get("packages"), "settings": results.get("settings"), "git": results.get("git")}
    measured = Measured(name, metrics, run_folder(Path(model)) if is_run else None, folder, origin.get("seed"))
    return Loaded(measured=(measured,), makings=(RunProvenance(f"evaluate {name}", facts=facts),))
