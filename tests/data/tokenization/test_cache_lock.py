"""Tests of the lock of a cache entry with several processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lpc_lightning.data.tokenization.cache_lock import one_at_a_time

SCRIPT = """
import sys, time
from pathlib import Path
from lpc_lightning.data.tokenization.cache_lock import one_at_a_time
entry = Path(sys.argv[1])
if not entry.exists():
    with one_at_a_time(entry):
        if not entry.exists():
            print("made", flush=True)
            time.sleep(float(sys.argv[2]))
            entry.mkdir(parents=True)
"""


def start(entry: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(entry), str(seconds)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return tmp_path / "tokens" / "abc"


@pytest.mark.slow
def test_lock_one_process_makes_the_entry(entry: Path) -> None:
    processes = [start(entry, 0.5) for _ in range(3)]
    assert sorted(process.communicate(timeout=60)[0] for process in processes) == ["", "", "made\n"]


@pytest.mark.slow
def test_lock_of_killed_process_is_released(entry: Path) -> None:
    first = start(entry, 60)
    assert first.stdout is not None
    assert first.stdout.readline() == "made\n"
    first.kill()
    first.communicate()
    second = start(entry, 0)
    assert second.communicate(timeout=60)[0] == "made\n"


@pytest.mark.slow
def test_lock_timeout_continues_without_lock(entry: Path) -> None:
    first = start(entry, 60)
    assert first.stdout is not None
    first.stdout.readline()
    began = time.monotonic()
    with one_at_a_time(entry, seconds=0.2):
        assert 0.2 <= time.monotonic() - began < 10
    first.kill()
    first.communicate()


def test_lock_unwritable_folder_continues_without_lock(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file where the folder should be")
    with one_at_a_time(tmp_path / "tokens" / "abc"):
        pass
