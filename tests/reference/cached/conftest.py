"""Data whose cache is the test's own, and what lies in it."""

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
    """Folders of that cache, one for each reference and data set."""
    return lambda: sorted((tmp_path / "reference").glob("*"))


@pytest.fixture
def parts(tmp_path: Path) -> Paths:
    """Files of all of them."""
    return lambda: sorted((tmp_path / "reference").glob("*/*"))


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the last run said of its reference, a line a stage, without the path."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True

    def said() -> list[str]:
        lines = [record.message for record in caplog.records if "reference log-probabilities" in record.message]
        caplog.clear()
        return [f"{line.partition(':')[0]}: {line.rpartition(': ')[2]}" for line in lines]

    return said
