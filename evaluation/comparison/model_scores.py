"""What is known of a model, in the form that models are compared in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, scores
from lpc_lightning.evaluation.comparison.stored import REQUEST


class Measure(NamedTuple):
    """What is compared: one metric of one task."""

    task: str
    metric: str


class Item(NamedTuple):
    """One question of a task. The hash tells apart two versions of a file."""

    doc_id: int | str
    doc_hash: str


@dataclass(frozen=True)
class ModelScores:
    """What is known of a model."""

    name: str
    scores: Mapping[Measure, float]
    stderrs: Mapping[Measure, float] = field(default_factory=dict)
    items: Mapping[Measure, Mapping[Item, float]] = field(default_factory=dict)
    """The scores of single items, for metrics that are their mean."""
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By task: what must be the same for a comparison (version, few-shot, limit ...)."""
    precision: str | None = None
    """Of the arithmetic, `float32` or `bfloat16`; None where it is not known. Scores differ by rounding."""


CONDITIONS = {
    "version": "version",
    "num_fewshot": "few-shot examples",
    "limit": "limit",
    "split": "split",
    "reward_kind": "reward",
}
"""What a task's record may hold that must be the same for a comparison, and what to call it."""


def scores_of(name: str, results: BenchmarkResults) -> ModelScores:
    """The scores in a model's results, by measure.

    Args:
        name: The model's name in the comparison.
        results: As `run_benchmarks` or `read_results` gives them.
    """
    found = {
        Measure(task, metric): each
        for task, metrics in results.metrics.items()
        for metric, each in scores(metrics).items()
    }
    values = {measure: value for measure, (value, _) in found.items()}
    items: dict[Measure, dict[Item, float]] = {}
    for item in results.items:
        for metric, value in item["metrics"].items():
            items.setdefault(Measure(item["task"], metric), {})[Item(item["doc_id"], item["doc_hash"])] = value
    shared = {
        "chat template": results.record.get("settings", {}).get("apply_chat_template"),
        "few-shot seed": results.record.get("seeds", {}).get("fewshot"),
    }
    return ModelScores(
        name=name,
        scores=values,
        stderrs={measure: error for measure, (_, error) in found.items() if error is not None},
        items={measure: each for measure, each in items.items() if _is_mean(values.get(measure), list(each.values()))},
        conditions={
            task: {told: record[key] for key, told in CONDITIONS.items() if key in record} | shared
            for task, record in results.record.get("tasks", {}).items()
        },
        precision=results.origin.get(REQUEST, {}).get("precision"),
    )


def _is_mean(value: float | None, items: Sequence[Any]) -> bool:
    """Whether a score is the mean over its items: perplexities, F1 and the like are not, and have no paired test."""
    if value is None or not all(isinstance(item, int | float) and math.isfinite(item) for item in items):
        return False
    return math.isclose(value, math.fsum(items) / len(items), rel_tol=1e-6, abs_tol=1e-9)
