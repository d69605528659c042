"""Tests of `lpc-lightning evaluate` with several models: differences, notes and names."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from scipy import stats

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.comparison.command import name_models
from tests.evaluation.conftest import write_rows
from tests.fixtures.commands import Command


@pytest.mark.slow
def test_models_are_compared_by_item(
    evaluate: Command, plain: str, checkpoint: Path, tmp_path: Path, no_model_is_opened: Callable[[], None]
) -> None:
    outcome = evaluate(plain, checkpoint, "--tasks", "arc_easy", "truthfulqa_mc2", "--names", "base", "ours")
    assert outcome.code == 0, outcome.err
    correct = {}
    for name in ("base", "ours"):
        lines = (tmp_path / "results" / name / "items.jsonl").read_text().splitlines()
        items = [json.loads(line) for line in lines]
        correct[name] = [item["metrics"]["acc"] for item in items if item["task"] == "arc_easy"]
    won = sum(b > a for a, b in zip(correct["base"], correct["ours"], strict=True))
    lost = sum(b < a for a, b in zip(correct["base"], correct["ours"], strict=True))
    assert won + lost > 1
    with (tmp_path / "results" / "comparison.csv").open(newline="") as file:
        rows = {(row["task"], row["metric"], row["model"]): row for row in csv.DictReader(file)}
    row = rows["arc_easy", "acc", "ours"]
    assert float(row["p_value"]) == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    assert float(row["difference"]) == pytest.approx((won - lost) / 12)
    assert (row["items"], row["method"], row["baseline"]) == ("12", "McNemar", "base")
    assert rows["truthfulqa_mc2", "acc", "ours"]["method"] == "sign flips"
    text = (tmp_path / "results" / "comparison.md").read_text()
    assert text.strip() in outcome.out
    assert len(json.loads((tmp_path / "results" / "comparison.json").read_text())) == len(rows)
    # Folders of results can be used in place of models.
    no_model_is_opened()
    folders = [tmp_path / "results" / name for name in ("base", "ours")]
    assert evaluate(*folders).code == 0
    assert (tmp_path / "results" / "comparison.md").read_text() == text
    # A comparison of other models goes to a file of its own.
    assert evaluate(*folders, "--names", "base", "other").code == 0
    assert (tmp_path / "results" / "comparison.md").read_text() == text
    assert "other" in (tmp_path / "results" / "comparison-2.md").read_text()


@pytest.mark.slow
def test_comparison_of_other_results_stays(evaluate: Command, plain: str, checkpoint: Path, tmp_path: Path) -> None:
    """The names of the models are equal, and their pairs are not."""
    folder = tmp_path / "results"
    for name, count in (("a", 6), ("b", 7)):
        rows = [{"prompt": f"{name}{n}", "chosen": "yes", "rejected": "no " * n + "no"} for n in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    flags = [plain, checkpoint, "--tasks=none", "--names", "base", "ours"]
    assert evaluate(*flags, "--preferences", tmp_path / "a.jsonl").code == 0
    first = {path.name: path.read_bytes() for path in folder.glob("comparison.*")}
    assert evaluate(*flags, "--preferences", tmp_path / "b.jsonl").code == 0
    assert {path.name: path.read_bytes() for path in folder.glob("comparison.*")} == first
    second = json.loads((folder / "comparison-2.json").read_text())
    assert {(row["model"], row["results"]) for row in second} == {("base", "base-2"), ("ours", "ours-2")}
    # The first command again: its results are read, and its comparison is the same.
    outcome = evaluate(*flags, "--preferences", tmp_path / "a.jsonl")
    assert "comparison.md, .csv and .json" in outcome.out
    assert {path.name: path.read_bytes() for path in folder.glob("comparison.*")} == first
    assert not (folder / "comparison-3.md").exists()


@pytest.mark.slow
def test_models_on_other_items_are_not_tested(evaluate: Command, plain: str, checkpoint: Path, tmp_path: Path) -> None:
    evaluate(plain, "--tasks=arc_easy", "--limit=4")
    outcome = evaluate(tmp_path / "results" / "plain", checkpoint, "--tasks=arc_easy", "--limit=5")
    assert outcome.code == 0
    assert "not comparable: limit is 5, but 4 for plain" in outcome.out
    assert "Below: differences to" not in outcome.out


@pytest.mark.slow
def test_models_in_other_precision_get_note(evaluate: Command, plain: str, tmp_path: Path) -> None:
    evaluate(plain, "--tasks=arc_easy", "--limit=4")
    outcome = evaluate(tmp_path / "results" / "plain", plain, "--tasks=arc_easy", "--limit=4", "--precision=bfloat16")
    assert outcome.code == 0, outcome.err
    assert (
        "plain-2 was evaluated in bfloat16, and plain in float32: its differences include rounding errors."
        in outcome.out
    )
    assert "Below: differences to plain" in outcome.out


@pytest.mark.slow
def test_models_with_other_template_get_note(evaluate: Command, plain: str, tmp_path: Path) -> None:
    """The weights are equal, and one folder has no chat template. Benchmarks without templates get no note."""
    bare, copy = (Path(shutil.copytree(plain, tmp_path / name)) for name in ("bare", "copy"))
    (bare / "chat_template.jinja").unlink()
    rows = [{"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no " * n + "no"} for n in range(5)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    outcome = evaluate(plain, copy, bare, "--tasks=arc_easy", "--limit=5", "--preferences", tmp_path / "pairs.jsonl")
    assert outcome.code == 0, outcome.err
    sentence = "bare was evaluated on preferences with another template than plain: its differences include"
    assert outcome.out.count(sentence) == 1
    assert outcome.out.count("another template") == 1
    chat = ["--tasks=arc_easy", "--limit=4", "--apply_chat_template=true"]
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + " ")
    assert "copy was evaluated on arc_easy with another template than plain" in evaluate(plain, copy, *chat).out


def test_name_models_gives_distinct_names() -> None:
    models = ["a/run/checkpoints/best.ckpt", "b/run/checkpoints/best.ckpt", "some/hub-name"]
    assert name_models(models, None) == [
        ("run-best", models[0]),
        ("run-best-2", models[1]),
        ("hub-name", models[2]),
    ]
    taken = [name for name, _ in name_models([*models[:2], "c/run/checkpoints/best-2.ckpt"], None)]
    assert taken == ["run-best", "run-best-3", "run-best-2"]
    assert name_models(models, ["x", "y", "z"])[2] == ("z", models[2])
    with pytest.raises(ConfigError, match="names: found x, y, x, expected no two equal names"):
        name_models(models, ["x", "y", "x"])
