"""Fixture: runs with pairs on record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lpc_lightning.evaluation.report.runs.records import RunRecord


@pytest.fixture
def give_own_prompts(tmp_path: Path) -> Callable[[Sequence[RunRecord]], list[RunRecord]]:
    """Function that puts validation pairs of runs on record. Each seed has a prompt of its own."""

    def give(records: Sequence[RunRecord]) -> list[RunRecord]:
        folders = {record.seed: tmp_path / "cells" / str(record.seed) for record in records}
        for seed, folder in folders.items():
            folder.mkdir(parents=True)
            pair = {"prompt": str(seed), "flipped": False, "tokens": [1, 1], "margins": {"prior": 1.0}}
            (folder / "pairs_validation.jsonl").write_text(json.dumps(pair))
        return [replace(record, folder=folders[record.seed] / "run", grid="grid") for record in records]

    return give
