"""Runs as `lpc-lightning fit`, `validate` and `test` leave them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lpc_lightning.algorithms.checkpoint import CheckpointError
from lpc_lightning.evaluation.report.runs.records import FINISHED, UNKNOWN, Curve, Loaded, Measured, RunRecord
from lpc_lightning.evaluation.report.runs.settings import SEED, dotted
from lpc_lightning.inference.checkpoints import read_checkpoint, run_folder

CONFIG, METRICS = "config.yaml", "metrics.csv"
KEPT = ("train/", "val/", "test/", "lm_eval/", "resources/")
"""How the names of columns begin that hold results; others count rows, epochs and the like."""


def load_run(folder: Path) -> Loaded:
    """A run folder. One of `validate` or `test` is what was measured of another run's checkpoint."""
    config = _config(folder)
    record = read_run(folder)
    checkpoint = config.get("ckpt_path")
    trained = any(name.startswith("train/") for name in record.curves) or (folder / "checkpoints").is_dir()
    if checkpoint and not trained:
        run = run_folder(Path(checkpoint))
        return Loaded(measured=(Measured(record.name, record.metrics, run, folder, record.seed),))
    return Loaded(records=(replace(record, parameters=checkpoint_parameters(folder)),))


def read_run(folder: Path) -> RunRecord:
    """What a fit has written: settings, metrics, time and memory. What is not there is left out.

    The time of a run without a cell around it is its median step times its steps.
    """
    config, curves = _config(folder), read_curves(folder / METRICS)
    summary: dict[str, Any] = {}
    if (folder / "summary.json").is_file():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    resources = summary.get("resources") or {}
    seconds, peak = resources.get("seconds_per_step"), resources.get("peak_memory_gib")
    stopped = (folder / "checkpoints" / "stopped.ckpt").exists()
    seed = config.get(SEED)
    return RunRecord(
        name=str(folder),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        status=FINISHED if summary else "stopped" if stopped else UNKNOWN,
        error=None if summary else "stopped before its end" if stopped else "no summary.json tells that it finished",
        place=folder,
        metrics={name: last for name, (last, _) in curves.items()},
        seconds=None if seconds is None else seconds * summary["steps"],
        peak_bytes=None if peak is None else peak * 2**30,
        curves={name: curve for name, (_, curve) in curves.items()},
        settings=dotted(config),
        own_axes=False,
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    # libyaml, where it is there, is ten times as fast.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return (yaml.load(path.read_text(encoding="utf-8"), loader) or {}) if path.is_file() else {}


def read_curves(path: Path) -> dict[str, tuple[float, Curve]]:
    """Lightning's `metrics.csv`: the last value of each metric, which may be NaN, and its finite values by step.

    Where a step has several values, the last one counts.
    """
    if not path.is_file():
        return {}
    found: dict[str, dict[int, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "step" not in header:
            return {}
        step = header.index("step")
        kept = [(place, name) for place, name in enumerate(header) if name.startswith(KEPT)]
        for row in rows:
            for place, name in kept:
                if place < len(row) and row[place] and row[step]:
                    found.setdefault(name, {})[int(float(row[step]))] = float(row[place])
    return {name: (list(values.values())[-1], _curve(values)) for name, values in found.items()}


def _curve(values: Mapping[int, float]) -> Curve:
    steps = [step for step in sorted(values) if math.isfinite(values[step])]
    return Curve(tuple(steps), tuple(values[step] for step in steps))


def checkpoint_parameters(folder: Path) -> dict[str, int]:
    """Trained parameters of policy and latent in a run's checkpoint; nothing where none can be read."""
    files = [path for path in sorted((folder / "checkpoints").glob("*.ckpt")) if path.is_file()]
    for path in files:
        try:
            weights = read_checkpoint(path).get("state_dict", {})
        except CheckpointError:
            continue
        counts = {"policy": 0, "latent": 0}
        tied = {(each.data_ptr(), each.shape): (name.partition(".")[0], each) for name, each in weights.items()}
        for part, each in tied.values():
            if part in counts:
                counts[part] += each.numel()
        return counts
    return {}
