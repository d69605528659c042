"""Tests of `lpc-lightning evaluate` with earlier results: what is read, added, and run again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM

from tests.evaluation.conftest import write_rows
from tests.fixtures.commands import Command


def test_existing_results_are_read(
    evaluate: Command, checkpoint: Path, no_model_is_opened: Callable[[], None], results: Any
) -> None:
    flags = [checkpoint, "--tasks", "arc_easy", "--limit=4"]
    first = evaluate(*flags)
    before = results("lpc-last")
    no_model_is_opened()
    again = evaluate(*flags)
    assert (first.code, again.code) == (0, 0)
    assert "Read from" in again.out
    assert [line for line in again.out.splitlines() if line.startswith("|")] == [
        line for line in first.out.splitlines() if line.startswith("|")
    ]
    assert results("lpc-last") == before
    forced = evaluate(*flags, "--again")
    assert forced.code == 1
    assert "a model was opened" in forced.errors[0]


def test_results_are_read_by_any_path(
    evaluate: Command,
    plain: str,
    data_dir: Path,
    task_file: Callable[..., str],
    no_model_is_opened: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the model, of the data, and of the file of a task."""
    own = task_file("own", ROWS)
    flags = ["--limit=4", "--names=plain", "--tasks", "arc_easy"]
    assert evaluate(plain, *flags, own).code == 0
    no_model_is_opened()
    for name, target in (("model", Path(plain)), ("data", data_dir), ("tasks", Path(own).parent)):
        (tmp_path / "links" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(target)
    monkeypatch.chdir(tmp_path / "links")
    task = Path(own).name
    for place in (os.path.relpath(plain), "model", str(tmp_path / "links" / "model")):
        for data in (os.path.relpath(data_dir), "data"):
            outcome = evaluate(place, f"--data-dir={data}", *flags, f"tasks/{task}")
            assert (outcome.code, "Read from" in outcome.out) == (0, True), outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["--limit=3", "--prior-mode=1", "--seed=5", "--apply-chat-template", "--num-fewshot=2"]
)
def test_other_settings_use_another_folder(
    evaluate: Command, checkpoint: Path, change: str, no_model_is_opened: Callable[[], None], results: Any
) -> None:
    flags = [checkpoint, "--tasks=arc_easy", *([] if "limit" in change else ["--limit=4"])]
    assert evaluate(*flags).code == 0
    assert evaluate(*flags, change).code == 0
    one, other = results("lpc-last"), results("lpc-last-2")
    assert one.origin["request"] != other.origin["request"]
    no_model_is_opened()
    assert evaluate(*flags).code == 0
    assert evaluate(*flags, change).code == 0


@pytest.mark.parametrize("changed", ["weights", "data"])
def test_changed_files_use_another_folder(
    evaluate: Command, checkpoint: Path, data_dir: Path, results: Any, changed: str
) -> None:
    flags = [checkpoint, "--tasks=arc_easy", "--limit=4"]
    assert evaluate(*flags).code == 0
    os.utime(checkpoint if changed == "weights" else data_dir / "arc/ARC-Easy/test.jsonl", (1, 1))
    assert "Read from" not in evaluate(*flags).out
    assert results("lpc-last-2").metrics == results("lpc-last").metrics


@pytest.mark.slow
def test_new_tasks_are_added_to_results(
    evaluate: Command, plain: str, results: Any, run_tasks: list[str], tmp_path: Path
) -> None:
    evaluate(plain, "--tasks", "arc_easy", "truthfulqa_mc1", "--limit=4")
    run_tasks.clear()
    outcome = evaluate(plain, "--tasks", "truthfulqa_mc1", "gsm8k", "--limit=4")
    assert outcome.code == 0
    assert "Continuing with the results in" in outcome.out
    assert run_tasks == ["gsm8k"]
    added = results("plain")
    shutil.rmtree(tmp_path / "results")
    evaluate(plain, "--tasks", "arc_easy", "truthfulqa_mc1", "gsm8k", "--limit=4")
    at_once = results("plain")
    assert added.metrics == at_once.metrics
    assert added.items == at_once.items
    assert added.record["settings"] == at_once.record["settings"]
    assert set(added.record["tasks"]) == set(at_once.record["tasks"])
    (earlier,) = added.record["earlier"]
    assert earlier["tasks"] == ["arc_easy", "truthfulqa_mc1"]
    assert earlier["packages"] == at_once.record["packages"]


ROWS = [
    {"question": f"Which {n}?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "AB"[n % 2]}
    for n in range(4)
]
RAISING = "def process_results(doc, results):\n    raise RuntimeError('no such luck')\n"


def test_failing_benchmark_sets_exit_code(
    evaluate: Command, plain: str, results: Any, task_file: Callable[..., str], run_tasks: list[str], tmp_path: Path
) -> None:
    broken = task_file("own", ROWS, RAISING)
    outcome = evaluate(plain, "--tasks", "arc_easy", broken, "--limit=4")
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert outcome.errors[0].startswith("plain, own: RuntimeError: no such luck")
    actual = results("plain")
    assert set(actual.metrics) == {"arc_easy"}
    assert set(actual.failures) == {"own"}
    assert "| own " in outcome.out
    assert "failed" in outcome.out
    run_tasks.clear()
    assert evaluate(plain, "--tasks", "arc_easy", "--limit=4").code == 0
    assert run_tasks == []


def test_changed_task_file_is_run_again(
    evaluate: Command, plain: str, results: Any, task_file: Callable[..., str], run_tasks: list[str]
) -> None:
    runs = []
    for score in (1.0, 0.25):  # texts of other lengths: of two files of one second, Python sees a change by the size
        own = task_file("own", ROWS, f"def process_results(doc, results):\n    return {{'acc': {score}}}\n")
        for _ in range(2):
            run_tasks.clear()
            assert evaluate(plain, "--tasks", "truthfulqa_mc1", own, "--limit=4").code == 0
            runs.append(list(run_tasks))
        assert results("plain").metrics["own"]["acc"] == score
    assert runs == [["truthfulqa_mc1", own], [], [own], []]


def test_rerun_repeats_failed_tasks_only(
    evaluate: Command, plain: str, results: Any, data_dir: Path, run_tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "generate_until", fail)
        assert evaluate(plain, "--tasks", "arc_easy", "gsm8k", "--limit=3").code == 1
    assert set(results("plain").failures) == {"gsm8k"}
    run_tasks.clear()
    assert evaluate(plain, "--tasks", "arc_easy", "gsm8k", "--limit=3").code == 0
    assert run_tasks == ["gsm8k"]
    assert results("plain").failures == {}
    assert set(results("plain").metrics) == {"arc_easy", "gsm8k"}


def test_interrupted_command_keeps_results(
    evaluate: Command, plain: str, results: Any, run_tasks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    tasks = ["--tasks", "truthfulqa_mc1", "arc_easy", "truthfulqa_mc2", "gsm8k", "--limit=3"]
    with monkeypatch.context() as patch:
        patch.setattr(HFLM, "generate_until", interrupt)
        assert evaluate(plain, *tasks).code == 130
    assert list(results("plain").metrics) == ["truthfulqa_mc1", "truthfulqa_mc2", "arc_easy"]
    run_tasks.clear()
    assert evaluate(plain, *tasks).code == 0
    assert run_tasks == ["gsm8k"]


def test_results_of_other_pairs_are_kept(
    evaluate: Command, plain: str, results: Any, tmp_path: Path, no_model_is_opened: Callable[[], None]
) -> None:
    """The second file has fewer pairs, and with the limit the first one has the two short ones."""
    for name, count in (("one", 4), ("two", 3)):
        prompts = ["Why?", "Where?", "When? " * 50, "Who? " * 50]
        rows = [{"prompt": prompt, "chosen": "So.", "rejected": "No."} for prompt in prompts[:count]]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    one, two = (f"--preferences={tmp_path / name}.jsonl" for name in ("one", "two"))
    for flags in ([one], [two], [one, "--max_length=100"]):
        assert evaluate(plain, "--tasks=none", *flags).code == 0
    names = ["plain", "plain-2", "plain-3"]
    assert [results(name).record["tasks"]["preferences"]["items"] for name in names] == [4, 3, 2]
    no_model_is_opened()
    for flags, name in (([one], "plain"), ([two], "plain-2")):
        assert f"Read from {tmp_path / 'results' / name}, " in evaluate(plain, "--tasks=none", *flags).out


def test_damaged_results_are_an_error(evaluate: Command, plain: str, tmp_path: Path) -> None:
    folder = tmp_path / "results" / "plain"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{")
    outcome = evaluate(plain, "--tasks=arc_easy")
    assert outcome.code == 1
    assert f"{folder}: found incomplete results (JSONDecodeError" in outcome.errors[0]
    assert (folder / "results.json").read_text() == "{"
