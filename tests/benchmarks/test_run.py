"""The whole benchmark on a tiny policy: both sides, each in a process of its own, step by step the same numbers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import run
from lpc_lightning.callbacks.step_parts import PARTS
from lpc_lightning.policy import TinyPolicy
from tests.fixtures.processes import ForkedProcess, run_in_fork

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def run_benchmark(arguments: list[str]) -> None:
    """Run the benchmark with the imports of its processes done once. Each of them is a fork of this process."""
    os.chdir(ROOT)
    importlib.import_module("benchmarks.trl_dpo")
    run.subprocess = SimpleNamespace(run=run_in_fork, STDOUT=subprocess.STDOUT)  # type: ignore[assignment]
    sys.argv[:] = ["benchmarks.run", *arguments]
    run.main()


def test_ours_and_trl_agree_step_by_step(tmp_path: Path) -> None:
    spec = TinyPolicy(width=32, layers=2)
    spec.build().causal_lm.save_pretrained(tmp_path / "model")
    spec.load_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": str(n), "prompt": f"say {n}", "chosen": "yes " * n, "rejected": "no " * 5} for n in range(1, 20)]
    pairs = tmp_path / "my_pairs.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["--data", str(pairs), "--precision", "32-true", "--steps", "4"]
    arguments += ["--sides", "TRL", "TRL precomputed", "ours", "--split"]
    arguments += ["--out", str(tmp_path / "out"), "--lr", "1e-3"]
    arguments += ["--model", str(tmp_path / "model"), "--peak-seconds", "0.01"]
    benchmark = ForkedProcess(run_benchmark, arguments, log=tmp_path / "log")
    assert benchmark.wait(timeout=300) == 0, benchmark.errors
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
        (ours,) = sides[name]
        assert ours["pairs"] == theirs["pairs"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["margin"] == pytest.approx(theirs["margin"], abs=1e-4)
        assert not ours["reference"]["in_step"]
        assert ours["reference"]["pairs"] == 16
        assert ours["reference"]["seconds"] > 0
    assert [set(parts) for parts in sides["time split of ours"][0]["shares"]] == [set(PARTS)] * 4
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("- PASS: ") == 2
    assert "| ours " in table


def test_call_reports_what_a_failed_process_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process finds the benchmarks in this folder, as this one does."""
    monkeypatch.chdir(ROOT)
    log = tmp_path / "log"
    run.call(["-m", "benchmarks.data_files"], log)
    assert log.read_text() == ""
    with pytest.raises(SystemExit, match=r"-c 'print\(1/0\)' failed:\n(.*\n)*ZeroDivisionError"):
        run.call(["-c", "print(1/0)"], log)


def test_every_other_round_runs_backwards() -> None:
    sides = ["a", "b", "time split of b"]
    assert [run.turns(sides, number) for number in range(3)] == [sides, ["b", "a"], ["a", "b"]]
