"""What batches of one prompt save, measured on a tiny policy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.shared_prompts import RANDOM, TOGETHER, main, rows


@pytest.mark.slow
def test_row_of_each_order(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["shared_prompts.py", *arguments, "--steps", "2"])
    main()
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert names == ["pairs of a batch", "---", RANDOM, TOGETHER]


@pytest.mark.slow
def test_batches_of_annotators(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight conversations of four statements, on which four people vote: a batch is one conversation."""
    votes = [
        {"prompt": f"Talk {talk}. Statement {number}?", "chosen": "Yes", "rejected": "No", "annotator": f"{talk}/{who}"}
        for talk in range(8)
        for who in range(4)
        for number in range(4)
    ]
    data = tmp_path / "votes.jsonl"
    data.write_text("\n".join(map(json.dumps, votes)))
    options = ["--data", str(data), "--steps", "2", "--batch-size", "16", "--pairs-per-annotator", "4"]
    monkeypatch.setattr("sys.argv", ["shared_prompts.py", *arguments, *options])
    main()
    random, together = (int(line.split("|")[2]) for line in capsys.readouterr().out.splitlines()[2:])
    assert together < 0.5 * random


def test_means_are_of_pairs() -> None:
    """The first batch does not count."""
    batches: Any = {
        RANDOM: [SimpleNamespace(pairs=9, tokens=900), *(SimpleNamespace(pairs=4, tokens=t) for t in (100, 300))],
        TOGETHER: [SimpleNamespace(pairs=9, tokens=900), *(SimpleNamespace(pairs=4, tokens=t) for t in (40, 80))],
    }
    passes = {RANDOM: [9.0, 1.0, 3.0], TOGETHER: [9.0, 1.0, 1.0]}
    steps = {RANDOM: [9.0, 4.0, 12.0], TOGETHER: [9.0, 2.0, 2.0]}
    assert rows(batches, passes, steps) == [
        f"| {RANDOM} | 50 | 0.500 | 1.00 | 2.000 | 1.00 |",
        f"| {TOGETHER} | 15 | 0.250 | 0.50 | 0.500 | 0.25 |",
    ]
