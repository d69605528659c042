"""What is there already, and what is missing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, write_results
from lpc_lightning.evaluation.comparison.stored import (
    REQUEST,
    add_run,
    find_folder,
    holds_results,
    missing_tasks,
    split_by_documents,
)


def run(metrics: Any = (), failures: Any = (), asked: Any = None, date: str = "d") -> BenchmarkResults:
    items = [{"task": task, "doc_id": 0, "doc_hash": "", "metrics": {}, "response": date} for task in metrics]
    record = {
        "tasks": {task: {"items": 1, "made": date} for task in metrics},
        "settings": {"tasks": list(asked if asked is not None else [*metrics, *failures])},
        "seconds": 1.5,
        "date": date,
        "packages": {},
        "platform": "p",
        "git": None,
    }
    return BenchmarkResults({t: {"acc": 1.0} for t in metrics}, items, dict.fromkeys(failures, "why"), record)


@pytest.mark.parametrize(
    ("stored", "tasks", "missing"),
    [
        (None, ["a", "b"], ["a", "b"]),
        (run(["a"]), ["a", "b"], ["b"]),
        (run(["a"], ["b"]), ["a", "b"], ["b"]),
        # A group has no score of its own, or has one.
        (run(["one", "two"], asked=["group"]), ["group"], []),
        (run(["group", "one"], asked=["group"]), ["group"], []),
        # It fails under the name of a task inside.
        (run(["one"], ["two"], asked=["group"]), ["group"], ["group"]),
        (run(["a", "one"], ["two"], asked=["a", "group"]), ["a"], []),
    ],
    ids=["nothing", "not asked", "failed", "group", "group with a score", "group that failed", "beside such a group"],
)
def test_what_is_missing(stored: BenchmarkResults | None, tasks: list[str], missing: list[str]) -> None:
    assert missing_tasks(stored, tasks) == missing


def test_newer_results_take_the_place_of_older_ones_which_say_how_they_were_made() -> None:
    first = add_run(None, run(["a", "b"], ["c"], date="first"))
    assert "earlier" not in first.record
    second = add_run(first, run(["b", "c"], ["d"], date="second"))
    assert list(second.metrics) == ["a", "b", "c"]
    assert [(item["task"], item["response"]) for item in second.items] == [
        ("a", "first"),
        ("b", "second"),
        ("c", "second"),
    ]
    assert set(second.failures) == {"d"}
    assert {task: record["made"] for task, record in second.record["tasks"].items()} == {
        "a": "first",
        "b": "second",
        "c": "second",
    }
    assert second.record["settings"]["tasks"] == ["a", "b", "c", "d"]
    assert (second.record["date"], second.record["seconds"]) == ("second", 3.0)
    made = {"date": "first", "packages": {}, "platform": "p", "git": None}
    assert second.record["earlier"] == [{"tasks": ["a", "b"], **made}]
    third = add_run(second, run(["e"], date="third"))
    assert [each["date"] for each in third.record["earlier"]] == ["first", "second"]


def test_tasks_about_the_same_documents_stay_together() -> None:
    tasks = ["truthfulqa_mc1", "arc_easy", "own.yaml", "truthfulqa_mc2", "piqa"]
    assert split_by_documents(tasks) == [["truthfulqa_mc1", "truthfulqa_mc2"], ["arc_easy"], ["own.yaml"], ["piqa"]]


def test_each_request_has_a_folder_and_finds_it_again(tmp_path: Path) -> None:
    requests = [{"limit": 1, "path": Path("a")}, {"limit": 2, "path": Path("a")}]
    for number, request in enumerate(requests):
        folder, found = find_folder(tmp_path, "model", request)
        assert (folder.name, found) == (["model", "model-2"][number], None)
        write_results(folder, run([f"task {number}"]), {REQUEST: request})
    for number, request in enumerate(requests):
        folder, found = find_folder(tmp_path, "model", request)
        assert found is not None
        assert (folder.name, list(found.metrics)) == (["model", "model-2"][number], [f"task {number}"])


def test_a_folder_of_results_is_no_model_with_results_beside_its_weights(tmp_path: Path) -> None:
    assert not holds_results(str(tmp_path))
    write_results(tmp_path, run(["a"]), {})
    assert holds_results(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert not holds_results(str(tmp_path))
