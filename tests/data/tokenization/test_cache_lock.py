"""Tests of the lock of a cache entry with several processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lpc_lightning.data.tokenization.cache_lock import one_at_a_time
from tests.fixtures.processes import ForkedProcess


def make(entry: Path, seconds: float) -> None:
    """Make the entry if it is missing, which takes some time, and print that."""
    if not entry.exists():
        with one_at_a_time(entry):
            if not entry.exists():
                print("made", flush=True)
                time.sleep(seconds)
                entry.mkdir(parents=True)


def start(entry: Path, seconds: float, name: str) -> ForkedProcess:
    return ForkedProcess(make, entry, seconds, log=entry.parents[1] / f"{name}.log")


def wait_for_lock(process: ForkedProcess) -> None:
    while not process.output.read_text():
        assert process.is_running, process.errors
        time.sleep(0.01)


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    return tmp_path / "tokens" / "abc"


@pytest.mark.slow
def test_lock_one_process_makes_the_entry(entry: Path) -> None:
    processes = [start(entry, 0.5, str(number)) for number in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert sorted(process.output.read_text() for process in processes) == ["", "", "made\n"]


@pytest.mark.slow
def test_lock_of_killed_process_is_released(entry: Path) -> None:
    first = start(entry, 60, "first")
    wait_for_lock(first)
    first.kill()
    second = start(entry, 0, "second")
    assert second.wait(timeout=60) == 0
    assert second.output.read_text() == "made\n"


@pytest.mark.slow
def test_lock_timeout_continues_without_lock(entry: Path) -> None:
    first = start(entry, 60, "first")
    wait_for_lock(first)
    began = time.monotonic()
    with one_at_a_time(entry, seconds=0.2):
        assert 0.2 <= time.monotonic() - began < 10
    first.kill()


def test_lock_unwritable_folder_continues_without_lock(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file where the folder should be")
    with one_at_a_time(tmp_path / "tokens" / "abc"):
        pass
