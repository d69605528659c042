"""The whole benchmark on a tiny policy: both sides, each in a process of its own, step by step the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.run import _turns
from lpc_lightning.callbacks.step_parts import PARTS
from lpc_lightning.policy import TinyPolicy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_ours_and_trl_agree_step_by_step(tmp_path: Path) -> None:
    spec = TinyPolicy(width=32, layers=2)
    spec.build().causal_lm.save_pretrained(tmp_path / "model")
    spec.load_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": str(n), "prompt": f"say {n}", "chosen": "yes " * n, "rejected": "no " * 5} for n in range(1, 20)]
    pairs = tmp_path / "my_pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "benchmarks.run", "--data", str(pairs), "--precision", "32-true", "--steps", "4"]
    command += ["--sides", "TRL", "TRL precomputed", "ours", "--split"]
    command += ["--out", str(tmp_path / "out"), "--lr", "1e-3"]
    command += ["--model", str(tmp_path / "model"), "--peak-seconds", "0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (cell,) = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert cell["data"] == "my_pairs"
    sides = cell["sides"]
    theirs = sides["TRL"][0]
    assert len(theirs["ended"]) == 4
    assert theirs["loss"][0] == pytest.approx(0.693147, abs=1e-5)
    assert abs(theirs["loss"][3] - theirs["loss"][0]) > 1e-3, "nothing was learned, so that little was compared"
    assert theirs["reference"]["in_step"]
    # The split comes after `ours`: each run works the reference out by itself, nothing is left by the one before.
    for name in ("TRL precomputed", "ours", "time split of ours"):
        (run,) = sides[name]
        assert run["pairs"] == theirs["pairs"]
        assert run["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert run["margin"] == pytest.approx(theirs["margin"], abs=1e-4)
        assert not run["reference"]["in_step"]
        assert run["reference"]["pairs"] == 16
        assert run["reference"]["seconds"] > 0
    assert [set(parts) for parts in sides["time split of ours"][0]["shares"]] == [set(PARTS)] * 4
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("- PASS: ") == 2
    assert "| ours |" in table


def test_every_other_round_runs_backwards() -> None:
    sides = ["a", "b", "time split of b"]
    assert [_turns(sides, number) for number in range(3)] == [sides, ["b", "a"], ["a", "b"]]
