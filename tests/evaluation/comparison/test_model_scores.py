"""Tests of the conversion from results to scores for a comparison."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults
from lpc_lightning.evaluation.comparison.comparison import compare
from lpc_lightning.evaluation.comparison.model_scores import Item, Measure, ModelScores, scores_of
from lpc_lightning.evaluation.statistics.significance import paired_test

ACC, F1 = Measure("quiz", "acc"), Measure("quiz", "f1")


def results(**record: Any) -> BenchmarkResults:
    """Make results with two items. `acc` is their mean, `f1` is not, and `perplexity` has two numbers per item."""
    metrics = {"quiz": {"acc": 0.5, "acc_stderr": 0.1, "f1": 0.9, "perplexity": 12.0}, "group": {"acc": 0.5}}
    items = [
        {
            "task": "quiz",
            "doc_id": n,
            "doc_hash": f"h{n}",
            "metrics": {"acc": float(n), "f1": 0.5, "perplexity": [1, 2]},
        }
        for n in range(2)
    ]
    return BenchmarkResults(metrics, items, {}, record)


RECORD = {
    "tasks": {"quiz": {"version": 2.0, "num_fewshot": 3, "limit": None, "seconds": 4.0}},
    "settings": {"apply_chat_template": True, "num_fewshot": None, "limit": 50},
    "seeds": {"fewshot": 9},
}


def test_scores_of_values_and_errors() -> None:
    actual = scores_of("mine", results(**RECORD))
    assert actual.name == "mine"
    assert actual.scores == {ACC: 0.5, F1: 0.9, Measure("quiz", "perplexity"): 12.0, Measure("group", "acc"): 0.5}
    assert actual.stderrs == {ACC: 0.1}


def test_scores_of_items_of_means_only() -> None:
    assert scores_of("mine", results(**RECORD)).items == {ACC: {Item(0, "h0"): 0.0, Item(1, "h1"): 1.0}}


def test_scores_of_nan_score_has_no_items() -> None:
    broken = results(**RECORD)
    broken.items[1]["metrics"]["acc"] = math.nan
    assert scores_of("mine", broken).items == {}


def test_scores_of_conditions() -> None:
    """A group of tasks has the settings of the run."""
    shared = {"chat template": True, "few-shot seed": 9}
    assert scores_of("mine", results(**RECORD)).conditions == {
        "quiz": {"version": 2.0, "few-shot examples": 3, "limit": None, **shared},
        "group": {"few-shot examples": None, "limit": 50, **shared},
    }


@pytest.mark.parametrize("beside", [{}, RECORD["settings"]])
def test_pairs_with_and_without_benchmarks(beside: dict[str, Any]) -> None:
    """Benchmarks beside the same pairs change no condition of the pairs."""
    record = {"tasks": {"preferences": {"version": "h", "limit": None, "split": "test", "reward_kind": "implicit"}}}
    settings = {"tasks": ["preferences"], **beside}
    scored = BenchmarkResults(
        {"preferences": {"accuracy/prior": 0.5}}, [], {}, {**RECORD, **record, "settings": settings}
    )
    expected = {"version": "h", "limit": None, "split": "test", "reward": "implicit"}
    assert scores_of("mine", scored).conditions == {"preferences": expected}


def test_scores_of_precision() -> None:
    with_request = replace(results(**RECORD), origin={"request": {"precision": "bfloat16", "limit": None}})
    assert scores_of("mine", with_request).precision == "bfloat16"


def test_scores_of_results_without_record() -> None:
    actual = scores_of("mine", results())
    assert not any(actual.conditions.values())
    assert actual.precision is None


@pytest.mark.parametrize("prompts", [2, 6])
def test_items_that_share_an_id_are_all_tested(prompts: int) -> None:
    """A file may have the id of the prompt in each of its rows. The test is that of rows with ids of their own."""

    def scored(name: str, right: list[float], ids: list[str]) -> ModelScores:
        items = [
            {"task": "quiz", "doc_id": doc_id, "doc_hash": "h", "metrics": {"acc": score}, "prompt": str(n % prompts)}
            for n, (doc_id, score) in enumerate(zip(ids, right, strict=True))
        ]
        return scores_of(name, BenchmarkResults({"quiz": {"acc": math.fsum(right) / 6}}, items, {}, RECORD))

    baseline, other = [1.0, 0, 0, 1, 0, 0], [1.0, 1, 0, 1, 1, 0]
    for ids in (["q1"] * 4 + ["q2"] * 2, list("abcdef")):
        _, cell = compare([scored("base", baseline, ids), scored("mine", other, ids)]).cells
        assert cell.test == paired_test(baseline, other, clusters=[n % prompts for n in range(6)])
