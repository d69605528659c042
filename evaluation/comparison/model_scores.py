"""Scores of a model, in the form needed for a comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lpc_lightning.evaluation.accuracy.scored_pairs import remarks
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, scores
from lpc_lightning.evaluation.comparison.stored import REQUEST


class Measure(NamedTuple):
    """One metric of one task: the unit of a comparison."""

    task: str
    metric: str


class Item(NamedTuple):
    """One document of a task. The hash distinguishes different versions of a file."""

    doc_id: int | str
    doc_hash: str
    copy: int = 0
    """Number of earlier items with this id and hash: rows of a file may share an id, such as that of their prompt."""


@dataclass(frozen=True)
class ModelScores:
    """Scores of a model, and the conditions under which they were computed."""

    name: str
    scores: Mapping[Measure, float]
    stderrs: Mapping[Measure, float] = field(default_factory=dict)
    items: Mapping[Measure, Mapping[Item, float]] = field(default_factory=dict)
    """Scores of single items, for metrics that are their mean."""
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By task or group, the conditions that must be equal in a comparison (version, few-shot, limit ...)."""
    precision: str | None = None
    """Precision of the arithmetic, `float32` or `bfloat16`. None if unknown. It changes scores by rounding only."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """By task, a hash of the template of its prompts. Tasks without a template on record are missing."""
    prompts: Mapping[Item, str] = field(default_factory=dict)
    """Prompt of each preference pair. Pairs of one prompt are tested together."""
    remarks: Sequence[str] = ()
    """Sentences on its pairs; see `remarks`."""
    folder: str = ""
    """Folder of the results, as a path from the folder of the comparison."""


CONDITIONS = {
    "version": "version",
    "task_file": "task file",
    "num_fewshot": "few-shot examples",
    "limit": "limit",
    "split": "split",
    "reward_kind": "reward",
}
"""Entries of a task's record that must be equal in a comparison, with their names in notes."""


def scores_of(name: str, results: BenchmarkResults, folder: str = "") -> ModelScores:
    """Convert a model's results for a comparison.

    Args:
        name: The model's name in the comparison.
        results: Results of `run_benchmarks` or `read_results`.
        folder: Folder of the results, as a path from the folder of the comparison.
    """
    values_and_errors = {
        Measure(task, metric): value_and_error
        for task, metrics in results.metrics.items()
        for metric, value_and_error in scores(metrics).items()
    }
    values = {measure: value for measure, (value, _) in values_and_errors.items()}
    items: dict[Measure, dict[Item, float]] = {}
    prompts: dict[Item, str] = {}
    copies = Counter[tuple[str, Item]]()
    for item in results.items:
        name_in_file = Item(item["doc_id"], item["doc_hash"])
        key = name_in_file._replace(copy=copies[item["task"], name_in_file])
        copies[item["task"], name_in_file] += 1
        for metric, value in item["metrics"].items():
            items.setdefault(Measure(item["task"], metric), {})[key] = value
        if "prompt" in item:
            prompts[key] = item["prompt"]
    records = results.record.get("tasks", {})
    return ModelScores(
        name=name,
        scores=values,
        stderrs={measure: error for measure, (_, error) in values_and_errors.items() if error is not None},
        items={
            measure: item_values
            for measure, item_values in items.items()
            if _is_mean(values.get(measure), list(item_values.values()))
        },
        prompts=prompts,
        conditions=conditions_of(results.record, results.metrics),
        precision=results.origin.get(REQUEST, {}).get("precision"),
        templates={task: record["template"] for task, record in records.items() if "template" in record},
        remarks=remarks(records),
        folder=folder,
    )


def conditions_of(record: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the conditions of each task or group of tasks, which must be equal in a comparison.

    Args:
        record: The record of a run of `evaluate`.
        names: Names of the tasks and groups. A group has no record of its own, but the settings of the run.
    """
    settings = record.get("settings", {})
    benchmarks = {
        "chat template": settings.get("apply_chat_template"),
        "few-shot seed": record.get("seeds", {}).get("fewshot"),
    }
    conditions: dict[str, dict[str, Any]] = {}
    for name in names:
        entries = record.get("tasks", {}).get(name, settings)
        conditions[name] = {label: entries[key] for key, label in CONDITIONS.items() if key in entries}
        # Pairs have no few-shot examples, and benchmarks beside them change nothing.
        conditions[name] |= benchmarks if "num_fewshot" in entries else {}
    return conditions


def _is_mean(value: float | None, items: Sequence[Any]) -> bool:
    """Return True if a score is the mean of its items. Perplexity and F1, for example, are not. They get no test."""
    if value is None or not all(isinstance(item, int | float) and math.isfinite(item) for item in items):
        return False
    return math.isclose(value, math.fsum(items) / len(items), rel_tol=1e-6, abs_tol=1e-9)
