"""How long OpenMP's threads spin is set before torch is loaded, by every entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSOLE = "from importlib.metadata import entry_points as e; e(group='console_scripts')['lpc-lightning'].load()"
CELL = """
from lpc_lightning.evaluation.ablation.cells.process import FORKED
process = FORKED.Process(target=print)
process.start()
process.join()
"""
ENTRIES = {
    "console command": ["-c", CONSOLE],
    "-m lpc_lightning": ["-m", "lpc_lightning"],
    "server of ablation cells": ["-c", CELL],
    "benchmarks": ["-m", "benchmarks.trl_dpo"],
    "tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_package.py"],
}
RECORDER = """
import os, sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            with open(os.environ["RECORD"], "a") as file:
                print(*(os.environ.get(each) for each in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")), file=file)
            raise ImportError("torch is not needed")

sys.meta_path.insert(0, Recorder())
"""
"""Run at the start of every process: it records the variables when torch would be loaded, and refuses to load it."""


def recorded(folder: Path, arguments: list[str], **variables: str) -> set[str]:
    """Return GOMP_SPINCOUNT and OMP_WAIT_POLICY at each import of torch, by all processes of a command."""
    (folder / "sitecustomize.py").write_text(RECORDER)
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "RECORD": str(folder / "record")}
    subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, timeout=60)
    return set((folder / "record").read_text().splitlines())


@pytest.mark.parametrize("entry", ENTRIES)
def test_spin_count_is_set_before_torch(entry: str, tmp_path: Path) -> None:
    assert recorded(tmp_path, ENTRIES[entry]) == {"1500 None"}


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("GOMP_SPINCOUNT=77", "77 None"), ("OMP_WAIT_POLICY=passive", "None passive"), ("KMP_BLOCKTIME=5", "None None")],
)
def test_a_users_own_setting_is_kept(variable: str, expected: str, tmp_path: Path) -> None:
    name, _, value = variable.partition("=")
    assert recorded(tmp_path, ENTRIES["-m lpc_lightning"], **{name: value}) == {expected}
