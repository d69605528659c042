"""Scores of single prompts that are on record: of the pairs of a cell, and of the items of `lpc-lightning evaluate`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
from torch import Tensor

from lpc_lightning.clustered_means import ClusterScores, cluster_scores, shares
from lpc_lightning.data import DataError
from lpc_lightning.evaluation.accuracy.accuracy_modes import Group, group_members
from lpc_lightning.evaluation.accuracy.scored_modes import ScoredPairs
from lpc_lightning.evaluation.benchmarks.results import ITEMS
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.statistics.calibration import calibration_deviations, calibration_error

PAIRS, DEVIATIONS = "pairs", "deviations"
"""Start of the names of the files of a cell: scores of its pairs, and metrics with what each prompt adds to them."""
STAGES = {"val": "validation", "test": "test"}
TRAINING = "training/"
"""Start of the names of metrics that a validation measures on training pairs."""
LM_EVAL = "lm_eval"
"""Folder in a run folder with the last results of the callback `LMEvaluation`, and the start of its metrics' names."""
OTHER_NAMES = {"rewards/accuracies": "accuracy/prior", "rewards/margins": "margin/prior", "loss": "log_loss/prior"}
"""Other names of metrics of pairs. The loss is one of them for some algorithms, and only then has its value."""
OF_SOURCE = {"accuracy": "accuracy/prior", "loss": "log_loss/prior"}
"""Start of the names of metrics of one data set of a mixture, with the same metrics of a source."""
Rows = list[dict[str, Any]]
Content = TypeVar("Content")


class Added(NamedTuple):
    """What the clusters behind a metric add to it."""

    prompts: ClusterScores
    annotators: ClusterScores | None = None
    """None: the metric does not depend on labels of annotators, or it is not on record."""
    both: ClusterScores | None = None
    """The same for each annotator with each prompt."""

    def minus(self, other: Added) -> Added:
        """Return what the clusters add to the difference of two metrics."""
        annotators, both = (
            None if ours is None or theirs is None else ours.minus(theirs)
            for ours, theirs in ((self.annotators, other.annotators), (self.both, other.both))
        )
        return Added(self.prompts.minus(other.prompts), annotators, both)


class PromptScores(NamedTuple):
    """What is on record about the prompts behind a metric of a run."""

    prompts: frozenset[str] | None = None
    """The prompts. None: they are not on record."""
    added: Added | None = None
    """What they add to the metric. None: it is not on record."""


NOT_ON_RECORD = PromptScores()


def prompt_scores(record: RunRecord, metric: str) -> PromptScores:
    """Return what is on record about the prompts behind a metric of a run, for the value in its metrics.

    Deviations are known only for that value. Otherwise weights with another result have been evaluated since, or the
    metric is neither a mean over pairs or items nor a calibration error.
    """
    value, measured = record.metrics[metric], record.measured.get(metric)
    if measured is not None and (measured / ITEMS).is_file():
        return _of_items(measured, metric, value)
    if record.folder is None:
        return NOT_ON_RECORD
    if metric.startswith(f"{LM_EVAL}/"):
        return _of_items(record.folder / LM_EVAL, metric.removeprefix(f"{LM_EVAL}/"), value)
    return _of_pairs(record.folder.parent, metric, value) if record.grid else NOT_ON_RECORD


@cache
def _of_pairs(cell: Path, metric: str, value: float) -> PromptScores:
    """Look for a metric among the scores that a cell has written itself, then among those of its pairs."""
    stage, _, name = metric.partition("/")
    written, pairs = (cell / f"{kind}_{STAGES.get(stage)}.jsonl" for kind in (DEVIATIONS, PAIRS))
    if not pairs.is_file() or name.startswith(TRAINING):
        return NOT_ON_RECORD
    scored, groups = _read_pairs(pairs)
    entry = _read_deviations(written).get(name) if written.is_file() else None
    mean, added = entry or _mean_and_added(scored, groups, name)
    return PromptScores(frozenset(scored.prompts.tolist()), added if _is_close(mean, value) else None)


def _mean_and_added(scored: ScoredPairs, groups: Mapping[str, Tensor], name: str) -> tuple[float, Added | None]:
    """Compute a metric from scored pairs, with what prompts add to it. NaN: it is not known from these pairs."""
    name = OTHER_NAMES.get(name, name)
    start, _, of_which = name.partition("/")
    if start in OF_SOURCE and f"/source/{of_which}" in groups:
        name = f"{OF_SOURCE[start]}/source/{of_which}"
    if name in (calibrated := scored.calibrated()):
        margins, members = calibrated[name]
        prompts = scored.prompts[members.numpy()]
        if len(set(prompts)) > 1:
            added = ClusterScores(calibration_deviations(margins, prompts), shares(prompts))
            return calibration_error(margins), Added(added)
    values = scored.values({suffix: members for suffix, members in groups.items() if name.endswith(suffix)})
    if name not in values:
        return math.nan, None
    scores, members = values[name]
    return float(scores.mean()), Added(cluster_scores(scores.numpy(), scored.prompts[members.numpy()]))


@cache
def _of_items(folder: Path, metric: str, value: float) -> PromptScores:
    path = folder / ITEMS
    by_task = _read_items(path) if path.is_file() else {}
    items = [item for task, rows in by_task.items() if metric.startswith(f"{task}/") for item in rows]
    if not items:
        return NOT_ON_RECORD
    prompts = [item.get("prompt") or f"{item['task']} {item['doc_id']} {item['doc_hash']}" for item in items]
    name = metric.removeprefix(f"{items[0]['task']}/")
    scores = [item["metrics"].get(name) for item in items]
    if all("flipped" in item and None not in item["response"].values() for item in items):
        scored = ScoredPairs.from_items([{**item, "margins": item["response"]} for item in items])
        mean, added = _mean_and_added(scored, group_members(items, ()), name)
        return PromptScores(frozenset(prompts), added if _is_close(mean, value) else None)
    if not all(isinstance(score, int | float) for score in scores) or not _is_close(float(np.mean(scores)), value):
        return PromptScores(frozenset(prompts))
    return PromptScores(frozenset(prompts), Added(cluster_scores(scores, prompts)))


def _is_close(mean: float, value: float) -> bool:
    return math.isclose(mean, value, rel_tol=1e-4, abs_tol=1e-6)


def _read(path: Path, convert: Callable[[Rows], Content]) -> Content:
    """Read the rows of a file.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return convert([json.loads(line) for line in file])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: found {type(error).__name__}: {error}, expected scores as JSON, a row in each line. Remove the "
            "file, without which there is no interval over prompts, or leave its run out."
        ) from error


@lru_cache(maxsize=8)
def _read_pairs(path: Path) -> tuple[ScoredPairs, dict[str, Tensor]]:
    """Read scored pairs, with the groups that they belong to."""

    def convert(rows: Rows) -> tuple[ScoredPairs, dict[str, Tensor]]:
        columns = [column for column in get_args(Group) if column in rows[0]]
        return ScoredPairs.from_items(rows), group_members(rows, columns)

    return _read(path, convert)


@lru_cache(maxsize=8)
def _read_deviations(path: Path) -> dict[str, tuple[float, Added]]:
    """Read metrics, with what clusters add to them."""
    return _read(path, lambda rows: {row["metric"]: (row["mean"], _added(row)) for row in rows})


def _added(row: Mapping[str, Any]) -> Added:
    if "prompts" not in row:  # cells of earlier versions have prompts alone
        return Added(ClusterScores(row["deviations"], row["shares"]))
    return Added(*(ClusterScores(**row[kind]) for kind in Added._fields))


@lru_cache(maxsize=8)
def _read_items(path: Path) -> dict[str, Rows]:
    """Read the items of each task."""

    def convert(rows: Rows) -> dict[str, Rows]:
        by_task: dict[str, Rows] = {}
        for row in rows:
            by_task.setdefault(row["task"], []).append(row)
        return by_task

    return _read(path, convert)
