"""Tests of what `lpc-lightning evaluate` rejects: models, pairs and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.cli import main
from tests.fixtures.commands import Command


@pytest.mark.slow
def test_invalid_model_does_not_stop_others(
    evaluate: Command, plain: str, checkpoint: Path, tmp_path: Path, results: Any
) -> None:
    checkpoint.write_text("not a checkpoint")
    outcome = evaluate(checkpoint, plain, tmp_path / "nowhere", "--tasks=arc_easy", "--limit=4")
    assert outcome.code == 1
    assert [error.partition(":")[0] for error in outcome.errors] == ["lpc-last", "nowhere"]
    assert "is no checkpoint" in outcome.errors[0]
    assert "found no file or folder" in outcome.errors[1]
    assert set(results("plain").metrics) == {"arc_easy"}


def test_error_names_a_model_once(evaluate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a model in the working directory is its name."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in ("empty", tmp_path / "empty"):
        outcome = evaluate(model, "--tasks=arc_easy", "--limit=4")
        expected = "empty: " if model == "empty" else f"empty: {model}: "
        assert outcome.errors[0].startswith(f"{expected}found a folder without config.json")


def test_invalid_pairs_do_not_stop_benchmarks(evaluate: Command, plain: str, results: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "So."}) + "\n")
    outcome = evaluate(plain, "--tasks=arc_easy", "--limit=4", f"--preferences={path}")
    assert outcome.code == 1
    assert outcome.errors[0].startswith("plain, preferences: 1 rows cannot be used.")
    assert "equal answers" in outcome.err
    assert set(results("plain").metrics) == {"arc_easy"}
    assert evaluate(plain, "--tasks=arc_easy", "--limit=0.6").code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit=0"], "limit: found 0, expected a number of documents, at least 1, or a share"),
        (["--num-fewshot=-1"], "num_fewshot: found -1, expected 0 or more"),
        (["--tasks=none"], "tasks: found none, expected a task, or a file of preference pairs"),
        (["--max_length=64"], "max_length: found 64 without preferences, expected a file of pairs (--preferences"),
        (["--bad_rows=skip"], "bad_rows: found 'skip' without preferences, expected a file of pairs (--preferences"),
        (["--columns.chosen=better"], "columns: found settings without preferences, expected"),
        (["--tasks=arc_esay"], "tasks: found 'arc_esay' with data_dir, expected arc_easy"),
        (["--names", "a", "b"], "names: found 2 for 1 models, expected one for each"),
        (["--preferences=nowhere.jsonl"], "preferences: found no file nowhere.jsonl, expected preference pairs"),
        (["--data-dir=nowhere"], "data_dir: found no file arc/ARC-Easy/train.jsonl for task arc_easy in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_evaluate_rejects_settings_early(
    plain: str, flags: list[str], message: str, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data-dir=nowhere" in flags else [f"--data-dir={data_dir}"]
    with pytest.raises(SystemExit) as exit_info:
        main(["evaluate", plain, f"--output={tmp_path / 'results'}", *flags, *data])
    outcome = capsys.readouterr()
    assert exit_info.value.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_prior_mode_with_pairs_is_rejected(evaluate: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    outcome = evaluate(checkpoint, "--prior-mode=1", f"--preferences={tmp_path / 'pairs.jsonl'}")
    assert outcome.code == 1
    assert outcome.errors[0].startswith("prior_mode: found 1 with a file of preference pairs")
