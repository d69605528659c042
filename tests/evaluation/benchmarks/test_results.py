"""Tests of result files: round trip, strict JSON, and atomic writes."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from lpc_lightning.evaluation.benchmarks.results import (
    BenchmarkResults,
    read_results,
    scores,
    stderr_name,
    to_json_value,
    write_results,
)
from lpc_lightning.evaluation.provenance import git_revision, package_versions, provenance


@pytest.fixture
def results() -> BenchmarkResults:
    exact = "exact_match,strict-match"
    return BenchmarkResults(
        metrics={"arc_easy": {"acc": 0.5, "acc_stderr": 0.1}, "gsm8k": {exact: 0.25}},
        items=[
            {"task": "arc_easy", "doc_id": 0, "doc_hash": "aa", "metrics": {"acc": 1.0}, "response": [-1.5, -2.0]},
            {"task": "gsm8k", "doc_id": 0, "doc_hash": "bb", "metrics": {exact: 0.0}, "response": "x"},
        ],
        failures={"truthfulqa_mc1": "LookupError: no"},
        record={"tasks": {"arc_easy": {"version": 1.0}}, "settings": {"limit": None}, "seconds": 1.5},
    )


def test_results_round_trip(results, tmp_path) -> None:
    path = write_results(tmp_path / "deep" / "folder", results, {"path": "a.ckpt"})
    assert path == tmp_path / "deep" / "folder" / "results.json"
    assert read_results(path.parent) == dataclasses.replace(results, origin={"path": "a.ckpt"})
    content = json.loads(path.read_text())
    assert list(content) == ["origin", "metrics", "failures", "tasks", "settings", "seconds", "folder"]
    assert content["folder"] == str(path.parent)
    assert {file.name for file in path.parent.iterdir()} == {"results.json", "items.jsonl"}


def test_items_with_unusual_characters(results, tmp_path) -> None:
    """Use line separators of `str.splitlines`, and a lone surrogate, which UTF-8 cannot encode."""
    unusual = "a\u2028b\x85c\x0cd\ne \ud800 ü"
    item = results.items[0] | {"response": unusual}
    write_results(tmp_path, dataclasses.replace(results, items=[item] * 3), {})
    assert [item["response"] for item in read_results(tmp_path).items] == [unusual] * 3
    assert "ü" in (tmp_path / "items.jsonl").read_text(encoding="utf-8")


def test_results_with_nan_are_strict_json(results, tmp_path) -> None:
    metrics = {"arc_easy": {"acc": math.nan, "acc_stderr": 0.1}}
    items = [results.items[0] | {"metrics": {"acc": math.nan}, "response": [-math.inf, -1.0]}]
    write_results(tmp_path, dataclasses.replace(results, metrics=metrics, items=items), {"loss": math.inf})

    def refuse(name):
        pytest.fail(f"{name} is not JSON")

    for line in [(tmp_path / "results.json").read_text(), *(tmp_path / "items.jsonl").read_text().splitlines()]:
        json.loads(line, parse_constant=refuse)
    actual = read_results(tmp_path)
    assert math.isnan(actual.metrics["arc_easy"]["acc"])
    assert actual.metrics["arc_easy"]["acc_stderr"] == 0.1
    assert math.isnan(actual.items[0]["metrics"]["acc"])
    assert actual.items[0]["response"] == [None, -1.0]
    assert actual.origin == {"loss": None}


def test_to_json_value_of_other_libraries() -> None:
    value = {
        "numpy": np.float32(0.5), "truth": np.bool_(True), "count": np.int64(3), "table": np.arange(3), 7: (1, {2}),
        "tensor": torch.tensor([1.0, math.nan]), "dtype": torch.bfloat16, "path": Path("a/b"), "none": None,
    }  # fmt: skip
    expected = {
        "numpy": 0.5, "truth": True, "count": 3, "table": [0, 1, 2], "7": [1, [2]],
        "tensor": [1.0, None], "dtype": "torch.bfloat16", "path": "a/b", "none": None,
    }  # fmt: skip
    assert json.loads(json.dumps(to_json_value(value), allow_nan=False)) == expected


@pytest.mark.parametrize("file", ["results.json", "items.jsonl"])
def test_failed_write_keeps_old_files(file, results, tmp_path) -> None:
    class Unprintable:
        def __str__(self):
            raise OSError("disk full")

    path = tmp_path / file
    write_results(tmp_path, results, {"run": 1})
    before = path.read_text()
    if file == "results.json":
        origin, items = {"run": Unprintable()}, results.items
    else:
        origin, items = {"run": 2}, [results.items[0], {"metrics": Unprintable()}]
    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path, dataclasses.replace(results, items=items), origin)
    assert path.read_text() == before
    assert read_results(tmp_path).origin == {"run": 1}
    assert {entry.name for entry in tmp_path.iterdir()} == {"results.json", "items.jsonl"}


def test_scores_pair_values_with_errors() -> None:
    metrics = {
        "acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.25,
        "exact_match,strict-match": 0.75, "exact_match_stderr,strict-match": 0.05,
    }  # fmt: skip
    assert stderr_name("exact_match,strict-match") == "exact_match_stderr,strict-match"
    assert scores(metrics) == {
        "acc": (0.5, 0.1), "acc_norm": (0.25, None), "exact_match,strict-match": (0.75, 0.05),
    }  # fmt: skip


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(["git", "-C", folder, *name, *arguments], check=True, capture_output=True, text=True).stdout


def test_git_revision_and_dirty_flag(tmp_path, monkeypatch) -> None:
    file = tmp_path / "package" / "__init__.py"
    file.parent.mkdir()
    file.write_text("1")
    assert git_revision(file) is None, "no repository"
    git(tmp_path, "init", "-q")
    (tmp_path / "other").write_text("1")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-qm", "other")
    assert git_revision(file) is None, "the file is not in the repository"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "package")
    revision = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_revision(file) == {"revision": revision, "dirty": False}
    file.write_text("2")
    assert git_revision(file) == {"revision": revision, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision(file) is None, "no git"


def test_package_versions_with_missing_package(monkeypatch) -> None:
    monkeypatch.setattr("lpc_lightning.evaluation.provenance.PACKAGES", ("torch", "no-such-package"))
    actual = package_versions()
    assert actual["torch"] == torch.__version__
    assert actual["no-such-package"] is None
    assert json.loads(json.dumps(provenance())).keys() == {"date", "packages", "platform", "git"}
