"""Tests of stored results: finding them, missing tasks, and adding to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, write_results
from lpc_lightning.evaluation.benchmarks.tasks import task_file_version
from lpc_lightning.evaluation.comparison.stored import (
    REQUEST,
    add_run,
    claim_folder,
    claim_name,
    holds_results,
    missing_tasks,
    split_by_documents,
)


def run(metrics: Any = (), failures: Any = (), tasks: Any = None, date: str = "d") -> BenchmarkResults:
    items = [{"task": task, "doc_id": 0, "doc_hash": "", "metrics": {}, "response": date} for task in metrics]
    record = {
        "tasks": {task: {"items": 1, "date": date} for task in metrics},
        "settings": {"tasks": list(tasks if tasks is not None else [*metrics, *failures])},
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
        # A group without its own score, and a group with one.
        (run(["one", "two"], tasks=["group"]), ["group"], []),
        (run(["group", "one"], tasks=["group"]), ["group"], []),
        # The failure of a group has the name of one of its tasks.
        (run(["one"], ["two"], tasks=["group"]), ["group"], ["group"]),
        (run(["a", "one"], ["two"], tasks=["a", "group"]), ["a"], []),
    ],
    ids=["nothing", "new task", "failed", "group", "group with score", "failed group", "beside failed group"],
)
def test_missing_tasks(stored: BenchmarkResults | None, tasks: list[str], missing: list[str]) -> None:
    assert missing_tasks(stored, tasks) == missing


@pytest.mark.parametrize("file", ["own.yaml", "_template_yaml", "utils.py", "rows.jsonl"])
def test_changed_task_file_is_missing(file: str, tmp_path: Path) -> None:
    """A task changes with its file, and with the template, the functions and the data that the file names."""
    path = tmp_path / "own.yaml"
    path.write_text("include: _template_yaml\nprocess_results: !function utils.last\n")
    (tmp_path / "_template_yaml").write_text("task: own\ndataset_kwargs: {data_files: rows.jsonl}\n")
    for name in ("utils.py", "rows.jsonl", "other.py"):
        (tmp_path / name).write_text("")
    stored = run(["own"], tasks=[str(path)])
    stored.record["tasks"]["own"]["task_file"] = task_file_version(str(path))
    (tmp_path / "other.py").write_text("# changed")
    assert missing_tasks(stored, [str(path)]) == []
    with (tmp_path / file).open("a") as opened:
        opened.write("# changed")
    assert missing_tasks(stored, [str(path)]) == [str(path)]


def test_add_run_replaces_and_lists_earlier_runs() -> None:
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
    assert {task: record["date"] for task, record in second.record["tasks"].items()} == {
        "a": "first",
        "b": "second",
        "c": "second",
    }
    assert second.record["settings"]["tasks"] == ["a", "b", "c", "d"]
    assert (second.record["date"], second.record["seconds"]) == ("second", 3.0)
    versions = {"date": "first", "packages": {}, "platform": "p", "git": None}
    assert second.record["earlier"] == [{"tasks": ["a", "b"], **versions}]
    third = add_run(second, run(["e"], date="third"))
    assert [run_record["date"] for run_record in third.record["earlier"]] == ["first", "second"]


@pytest.mark.parametrize("name", ["tasks/own.yaml", "tag"])
def test_add_run_of_a_task_that_failed_to_load(name: str) -> None:
    """The failure has the name that was asked for, and the scores have the names of the tasks."""
    stored = add_run(run(failures=[name]), run(["one", "two"], tasks=[name]))
    assert stored.failures == {}
    assert missing_tasks(stored, [name]) == []
    again = add_run(stored, run(failures=[name], tasks=[name]))
    assert set(again.failures) == {name}


def test_split_by_documents() -> None:
    tasks = ["truthfulqa_mc1", "arc_easy", "own.yaml", "truthfulqa_mc2", "piqa"]
    assert split_by_documents(tasks) == [["truthfulqa_mc1", "truthfulqa_mc2"], ["arc_easy"], ["own.yaml"], ["piqa"]]


def test_claim_folder_per_request(tmp_path: Path) -> None:
    requests = [{"limit": 1, "path": Path("a")}, {"limit": 2, "path": Path("a")}]
    for number, request in enumerate(requests):
        with claim_folder(tmp_path, "model", request, {}) as (folder, actual):
            assert (folder.name, actual) == (["model", "model-2"][number], None)
            write_results(folder, run([f"task {number}"]), {REQUEST: request})
    for number, request in enumerate(requests):
        with claim_folder(tmp_path, "model", request, {}) as (folder, actual):
            assert actual is not None
            assert (folder.name, list(actual.metrics)) == (["model", "model-2"][number], [f"task {number}"])


def test_claim_folder_per_version_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without results of the task can take them. Results of other tasks do not matter."""
    places = {}
    for version in ("a", "b"):
        with claim_folder(tmp_path, "model", {}, {"pairs": version}) as (folder, actual):
            assert actual is None
            results, places[version] = run(["pairs"]), folder
            results.record["tasks"]["pairs"]["version"] = version
            write_results(folder, results, {REQUEST: {}})
    assert [folder.name for folder in places.values()] == ["model", "model-2"]
    assert f"{places['a']} keeps its results of pairs: they are of other pairs" in capsys.readouterr().out
    for versions, name in (({"pairs": "a"}, "a"), ({"pairs": "b", "more": "c"}, "b"), ({"more": "c"}, "a")):
        with claim_folder(tmp_path, "model", {}, versions) as (folder, actual):
            assert actual is not None
            assert (folder, actual.record["tasks"]["pairs"]["version"]) == (places[name], name)


def test_commands_that_run_together_do_not_meet(tmp_path: Path) -> None:
    with (
        claim_folder(tmp_path, "model", {"limit": 1}, {}) as (first, _),
        claim_folder(tmp_path, "model", {"limit": 2}, {}) as (second, _),
    ):
        assert (first.name, second.name) == ("model", "model-2")
        write_results(first, run(["a"]), {REQUEST: {"limit": 1}})
    with claim_folder(tmp_path, "model", {"limit": 2}, {}) as (third, _):
        assert third.name == "model-2"  # free again


def test_comparisons_made_together_do_not_meet(tmp_path: Path) -> None:
    with claim_name(tmp_path, "comparison", bool) as first, claim_name(tmp_path, "comparison", bool) as second:
        assert (first, second) == ("comparison", "comparison-2")
        with claim_folder(tmp_path, "comparison", {}, {}) as (folder, _):
            assert folder.name == "comparison"  # the folder of a model with this name
    with claim_name(tmp_path, "comparison", bool) as again:
        assert again == "comparison"


def test_holds_results_of_model_folder(tmp_path: Path) -> None:
    assert not holds_results(str(tmp_path))
    write_results(tmp_path, run(["a"]), {})
    assert holds_results(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert not holds_results(str(tmp_path))
