"""Two processes that want the same entry: one makes it."""

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


def test_one_makes_it_and_the_others_wait(entry: Path) -> None:
    processes = [start(entry, 0.5) for _ in range(3)]
    assert sorted(process.communicate(timeout=60)[0] for process in processes) == ["", "", "made\n"]


def test_the_lock_of_a_killed_process_is_free(entry: Path) -> None:
    first = start(entry, 60)
    assert first.stdout is not None
    assert first.stdout.readline() == "made\n"
    first.kill()
    first.communicate()
    second = start(entry, 0)
    assert second.communicate(timeout=60)[0] == "made\n"


def test_who_takes_too_long_is_not_waited_for(entry: Path) -> None:
    first = start(entry, 60)
    assert first.stdout is not None
    first.stdout.readline()
    began = time.monotonic()
    with one_at_a_time(entry, seconds=0.2):
        assert 0.2 <= time.monotonic() - began < 10
    first.kill()
    first.communicate()


def test_a_folder_that_cannot_be_locked_is_gone_on_without(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file where the folder should be")
    with one_at_a_time(tmp_path / "tokens" / "abc"):
        pass
