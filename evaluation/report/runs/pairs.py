"""The scores of single pairs that `lpc-lightning ablate` has written, by prompt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpc_lightning.evaluation.accuracy.accuracy_modes import LENGTH_RATIO
from lpc_lightning.evaluation.statistics.clusters import deviations

STAGES = {"val": "validation", "test": "test"}
METRIC = re.compile(r"(val|test)/(gold_)?(accuracy|margin|log_loss)/([a-z_]+)(/length_matched)?")
"""Metrics that are means over pairs."""


@cache
def prompt_deviations(cell: Path, metric: str, value: float) -> Mapping[str, float] | None:
    """Return what the pairs of each prompt add to a metric of a cell; see `deviations`.

    Args:
        cell: The cell's folder.
        metric: Name of the metric.
        value: Value of the metric in the cell's results.

    Returns:
        Deviations by prompt. None: the metric is no mean over pairs, or the cell has no file of pairs with this mean.
    """
    name = metric.replace("rewards/accuracies", "accuracy/prior")
    match = METRIC.fullmatch(name)
    path = cell / f"pairs_{STAGES[match[1]]}.jsonl" if match else None
    if match is None or path is None or not path.is_file():
        return None
    rows = [row for row in _read(path) if match[4] in row["margins"] and (not match[5] or _is_matched(row))]
    margins = np.array([row["margins"][match[4]] for row in rows])
    if match[2]:
        margins = np.where([row["flipped"] for row in rows], -margins, margins)
    scores = _score(match[3], margins)
    # Weights with another result have been evaluated since, or a mean over the pairs has another definition.
    if not len(rows) or not math.isclose(scores.mean(), value, rel_tol=1e-4, abs_tol=1e-6):
        return None
    return deviations(scores, [row["prompt"] for row in rows])


@lru_cache(maxsize=8)
def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _is_matched(row: Mapping[str, Any]) -> bool:
    return max(row["tokens"]) < LENGTH_RATIO * min(row["tokens"])


def _score(name: str, margins: NDArray[np.float64]) -> NDArray[np.float64]:
    scores = {"accuracy": (np.sign(margins) + 1) / 2, "margin": margins, "log_loss": np.logaddexp(0, -margins)}
    return np.asarray(scores[name])
