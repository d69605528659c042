"""The cost of a busy neighbour, in miniature."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import neighbour
from benchmarks.neighbour import busy_process, measure, render
from tests.fixtures.processes import ForkedProcess, run_in_fork

ROOT = Path(__file__).parents[2]


def test_table_has_medians_and_their_ratio() -> None:
    seconds = {(10_000, False): [2.0, 9.0, 1.0], (10_000, True): [3.0, 5.0, 4.0]}
    (row,) = render(seconds).splitlines()[2:]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["10000", "2.00", "4.00", "2.00"]


def test_busy_process_runs_until_the_end() -> None:
    with busy_process() as process:
        assert process.poll() is None
    assert process.poll() is not None


def time_steps() -> None:
    """Measure a fit in a fork of this process."""
    os.chdir(ROOT)
    neighbour.subprocess = SimpleNamespace(run=run_in_fork)  # type: ignore[assignment]
    print(measure(10_000, is_beside=False, steps=2, settings={"policy.layers": "1"}))


@pytest.mark.slow
def test_steps_of_a_fit_are_timed(tmp_path: Path) -> None:
    process = ForkedProcess(time_steps, log=tmp_path / "log")
    assert process.wait() == 0, process.errors
    assert 0 < float(process.output.read_text()) < 60
