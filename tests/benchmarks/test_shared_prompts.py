"""What batches of one prompt save, measured on a tiny policy."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.shared_prompts import RANDOM, TOGETHER, main, rows
from lpc_lightning.policy import TinyPolicy


@pytest.mark.slow
def test_row_of_each_order(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    TinyPolicy(width=16, layers=1, heads=2).build().causal_lm.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["shared_prompts.py", *arguments, "--steps", "2"])
    main()
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()]
    assert names == ["pairs of a batch", "---", RANDOM, TOGETHER]


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
