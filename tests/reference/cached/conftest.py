"""Fixtures: data with a cache of the test's own, and the contents of that cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

Paths = Callable[[], list[Path]]


@pytest.fixture
def own_data(small_data: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`small_data` with an empty cache."""
    return partial(small_data, cache_dir=str(tmp_path))


@pytest.fixture
def entries(tmp_path: Path) -> Paths:
    """Return a function that lists the folders of the cache, one for each reference and data set."""
    return lambda: sorted((tmp_path / "reference").glob("*"))


@pytest.fixture
def parts(tmp_path: Path) -> Paths:
    """Return a function that lists the files in all folders."""
    return lambda: sorted((tmp_path / "reference").glob("*/*"))


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that lists the log lines of the last run's reference, without paths."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True

    def lines_of_last_run() -> list[str]:
        lines = [record.message for record in caplog.records if "reference log-probabilities" in record.message]
        caplog.clear()
        return [f"{line.partition(':')[0]}: {line.rpartition(': ')[2]}" for line in lines]

    return lines_of_last_run
