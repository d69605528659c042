"""The scores of single pairs that `lpc-lightning ablate` has written, by prompt."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpc_lightning.evaluation.accuracy.scored_modes import LENGTH_RATIO
from lpc_lightning.evaluation.statistics.clusters import deviations
from lpc_lightning.evaluation.statistics.seeds import MIN_PROMPTS

STAGES = {"val": "validation", "test": "test"}
TRAINING = "training/"
"""Start of the names of metrics that a validation measures on training pairs."""
METRIC = re.compile(r"(val|test)/(gold_)?(accuracy|margin|log_loss)/([a-z_]+)(/length_matched)?")
"""Metrics that are means over pairs."""
OTHER_NAMES = {"rewards/accuracies": "accuracy/prior", "rewards/margins": "margin/prior", "loss": "log_loss/prior"}
"""Other names of these metrics. The loss is one of them for some algorithms; see `prompt_deviations`."""


@cache
def prompt_deviations(cell: Path, metric: str, value: float) -> Mapping[str, float] | None:
    """Return what the pairs of each prompt add to a metric of a cell; see `deviations`.

    Args:
        cell: The cell's folder.
        metric: Name of the metric.
        value: Value of the metric in the cell's results.

    Returns:
        Deviations by prompt. With fewer than `MIN_PROMPTS` prompts they are 0 for a metric that is no mean over pairs:
        it has no interval either. None: the metric is no mean over pairs, or the cell has no file of pairs with this
        mean.
    """
    stage, _, name = metric.partition("/")
    path = cell / f"pairs_{STAGES.get(stage)}.jsonl"
    if not path.is_file() or name.startswith(TRAINING):
        return None
    match = METRIC.fullmatch(f"{stage}/{OTHER_NAMES.get(name, name)}")
    added = _deviations(_read(path), match, value) if match else None
    return added if added is not None else dict.fromkeys(_few_prompts(path), 0.0) or None


def _deviations(rows: Sequence[Mapping[str, Any]], metric: re.Match[str], value: float) -> Mapping[str, float] | None:
    _, gold, kind, mode, matched = metric.groups()
    rows = [row for row in rows if mode in row["margins"] and (not matched or _is_matched(row))]
    margins = np.array([row["margins"][mode] for row in rows])
    if gold:
        margins = np.where([row["flipped"] for row in rows], -margins, margins)
    scores = _score(kind, margins)
    # Weights with another result have been evaluated since, or a mean over the pairs has another definition.
    if not len(rows) or not math.isclose(scores.mean(), value, rel_tol=1e-4, abs_tol=1e-6):
        return None
    return deviations(scores, [row["prompt"] for row in rows])


@lru_cache(maxsize=8)
def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@cache
def _few_prompts(path: Path) -> frozenset[str]:
    """Return the prompts of a file of pairs. Empty: there are `MIN_PROMPTS` or more."""
    prompts = frozenset(row["prompt"] for row in _read(path))
    return prompts if len(prompts) < MIN_PROMPTS else frozenset()


def _is_matched(row: Mapping[str, Any]) -> bool:
    return max(row["tokens"]) < LENGTH_RATIO * min(row["tokens"])


def _score(name: str, margins: NDArray[np.float64]) -> NDArray[np.float64]:
    scores = {"accuracy": (np.sign(margins) + 1) / 2, "margin": margins, "log_loss": np.logaddexp(0, -margins)}
    return np.asarray(scores[name])
