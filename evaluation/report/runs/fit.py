"""Read runs that `lpc-lightning fit`, `validate` and `test` have written."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpc_lightning.errors import CheckpointError
from lpc_lightning.evaluation.report.runs.records import FINISHED, UNKNOWN, Curve, Loaded, Measurement, RunRecord
from lpc_lightning.evaluation.report.runs.settings import SEED, WEIGHTS, Value, flatten
from lpc_lightning.files.json_files import read_if_whole
from lpc_lightning.files.yaml_files import read_yaml
from lpc_lightning.inference.checkpoints import read_checkpoint, run_folder

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.csv", "summary.json"
RESULT_PREFIXES = ("train/", "val/", "test/", "lm_eval/", "resources/")
"""Prefixes of the columns that hold results. Other columns are row numbers, epochs and the like."""
MEASURING_SETTINGS = {
    "data": "",
    "trainer.precision": "",
    "trainer.limit_val_batches": "val/",
    "trainer.limit_test_batches": "test/",
    "callbacks.AnnotatorAdaptation": "/adaptation/",
    "callbacks.LMEvaluation": "lm_eval/",
}
"""Settings of `validate` and `test`, with the arguments below them, that change metrics with this part in their names.
Model, policy and latent are those of the checkpoint."""


def load_run(folder: Path) -> Loaded:
    """Read a run folder. A folder of `validate` or `test` is a measurement of another run's checkpoint."""
    config = _read_config(folder)
    record = read_run(folder)
    checkpoint = config.get("ckpt_path")
    trained = any(name.startswith("train/") for name in record.curves) or (folder / "checkpoints").is_dir()
    if checkpoint and not trained:
        path = Path(checkpoint)
        conditions = {metric: {**_conditions(record, metric), WEIGHTS: weights_kind(path)} for metric in record.metrics}
        measured = Measurement(record.name, record.metrics, run_folder(path), folder, record.seed, conditions)
        return Loaded(measurements=(measured,))
    return Loaded(records=(replace(record, parameters=checkpoint_parameters(folder)),))


def _conditions(record: RunRecord, metric: str) -> dict[str, Value]:
    """Return the settings of a measurement that change a metric."""
    names = [name for name, part in MEASURING_SETTINGS.items() if part in metric]
    return {
        setting: value
        for setting, value in record.settings.items()
        if any(setting == name or setting.startswith(f"{name}.") for name in names)
    }


def weights_kind(checkpoint: Path) -> str:
    """Return the kind of weights in a checkpoint, from the name of the file: `best`, `last`, `epoch=N-step=N`."""
    return re.sub(r"\d+", "N", checkpoint.stem)


def read_run(folder: Path) -> RunRecord:
    """Read what a fit has written: settings, metrics, time and memory. Missing files are left out.

    The time of a run that is not a cell is its median step time multiplied by its number of steps.
    """
    config, curves = _read_config(folder), read_curves(folder / METRICS)
    summary = read_if_whole(folder / SUMMARY, "It is not known whether the run finished.")
    resources = summary.get("resources") or {}
    seconds, peak = resources.get("seconds_per_step"), resources.get("peak_memory_gib")
    status, error = _status(folder, bool(summary))
    seed = config.get(SEED)
    return RunRecord(
        name=str(folder),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        status=status,
        error=error,
        folder=folder,
        metrics={name: last for name, (last, _) in curves.items()},
        seconds=None if seconds is None else seconds * summary["steps"],
        peak_bytes=None if peak is None else peak * 2**30,
        curves={name: curve for name, (_, curve) in curves.items()},
        settings={**flatten(config), WEIGHTS: "last"} if config else {},
        versions=flatten(summary.get("versions") or {}),
    )


def _status(folder: Path, has_summary: bool) -> tuple[str, str | None]:
    if has_summary:
        return FINISHED, None
    if (folder / "checkpoints" / "stopped.ckpt").exists():
        return "stopped", "stopped before its end"
    return UNKNOWN, f"{SUMMARY} is missing or damaged, so that it is not known whether the run finished"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return (read_yaml(path) or {}) if path.is_file() else {}


def read_curves(path: Path) -> dict[str, tuple[float, Curve]]:
    """Read Lightning's `metrics.csv`.

    If a step has several values of a metric, a curve takes the first one: `validate` after a fit logs the scores of the
    best checkpoint at the last step of the fit.

    Returns:
        By metric: the last value, which may be NaN, and the finite values by step. Empty if there is no such file or
        no column `step`.
    """
    if not path.is_file():
        return {}
    last: dict[str, float] = {}
    curves: dict[str, dict[int, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if "step" not in header:
            return {}
        step = header.index("step")
        columns = [(index, name) for index, name in enumerate(header) if name.startswith(RESULT_PREFIXES)]
        for row in rows:
            for index, name in columns:
                if index < len(row) and row[index] and row[step]:
                    last[name] = float(row[index])
                    curves.setdefault(name, {}).setdefault(int(float(row[step])), last[name])
    return {name: (last[name], _curve(values)) for name, values in curves.items()}


def _curve(values: Mapping[int, float]) -> Curve:
    steps = [step for step in sorted(values) if math.isfinite(values[step])]
    return Curve(tuple(steps), tuple(values[step] for step in steps))


def checkpoint_parameters(folder: Path) -> dict[str, int]:
    """Count the trained parameters of policy and latent in a run's first readable checkpoint. Empty: there is none."""
    files = [path for path in sorted((folder / "checkpoints").glob("*.ckpt")) if path.is_file()]
    for path in files:
        try:
            weights = read_checkpoint(path).get("state_dict", {})
        except CheckpointError:
            continue
        counts = {"policy": 0, "latent": 0}
        # Tied weights share their memory and are counted once.
        unique = {(tensor.data_ptr(), tensor.shape): (name, tensor) for name, tensor in weights.items()}
        for name, tensor in unique.values():
            if (part := name.partition(".")[0]) in counts:
                counts[part] += tensor.numel()
        return counts
    return {}
