"""What kept states save, measured on a tiny policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.frozen_layers import ALL, KNOWN, NEW, main, rows
from lpc_lightning.policy import TinyPolicy


@pytest.mark.slow
def test_three_rows_for_each_number_of_layers(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    TinyPolicy(width=16, layers=3, heads=2).build().causal_lm.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["frozen_layers.py", *arguments, "--steps", "2", "--layers", "2", "1"])
    main()
    lines = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if "---" not in line]
    assert [[cell.strip() for cell in line] for line in lines[1:]] == [
        [layers, name] for layers in "21" for name in (ALL, NEW, KNOWN)
    ]


def test_ratios_are_of_the_same_batches() -> None:
    """The first step does not count. The last batch is long."""
    seconds = {ALL: [9.0, 2.0, 2.0, 8.0], NEW: [9.0, 3.0, 3.0, 8.0], KNOWN: [9.0, 1.0, 0.5, 4.0]}
    assert rows(4, seconds) == [
        f"| 4 | {ALL} | 2.00 | 1.00 |",
        f"| 4 | {NEW} | 3.00 | 1.50 |",
        f"| 4 | {KNOWN} | 1.00 | 0.50 |",
    ]
