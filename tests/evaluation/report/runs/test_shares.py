"""Tests of settings in which 1 is a number of items and 1.0 is all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.report.contents import read_contents
from lpc_lightning.evaluation.report.contrasts import read_baseline
from lpc_lightning.evaluation.report.runs.settings import flatten
from lpc_lightning.evaluation.report.study import Study

METRIC = "val/rewards/accuracies"


@pytest.fixture
def study(write_ablation: Callable[..., Path]) -> Callable[..., Study]:
    """Function that writes grids, each with values of an axis that sets a setting of the trainer, and reads them."""

    def read(setting: str, *values: list[Any], missing: Any = None) -> Study:
        def metric(value: Any, seed: int) -> float | None:
            return None if repr(value) == repr(missing) else 0.5

        folders = [write_ablation({"frac": each}, [1, 2], metric) for each in values]
        for path in (path for folder in folders for path in folder.glob("cells/*/cell.json")):
            cell = json.loads(path.read_text())
            value, seed = cell["axes"]["frac"], cell["seed"]
            cell["arguments"][-2:] = [f"--trainer.{setting}={value}", f"--seed_everything={seed}"]
            path.write_text(json.dumps(cell))
            config = path.parent / "run" / "config.yaml"
            content = yaml.safe_load(config.read_text())
            content["trainer"][setting] = value
            config.write_text(yaml.safe_dump(content))
        return read_contents(list(map(str, folders)), None, [METRIC], None).subject.study

    return read


@pytest.mark.parametrize("setting", ["overfit_batches", "val_check_interval", "limit_train_batches"])
def test_one_and_all_are_two_groups(study: Callable[..., Study], setting: str) -> None:
    for grids in ([[1, 1.0]], [[1], [1.0]]):
        found = study(setting, *grids)
        assert found.axes == {"frac": (1, "1.0")}
        assert [len(group.values(METRIC)) for group in found.groups] == [2, 2]
        assert read_baseline(found, ["frac=1"]) == {"frac": 1}
        assert read_baseline(found, ["frac=1.0"]) == {"frac": "1.0"}
        with pytest.raises(ConfigError, match=r"expected AXIS=VALUE of frac = 1, 1\.0"):
            read_baseline(found, ["frac=2"])


def test_missing_cell_of_all(study: Callable[..., Study]) -> None:
    found = study("overfit_batches", [1, 1.0], missing=1.0)
    statuses = [(group.axes["frac"], [record.status for record in group.records]) for group in found.groups]
    assert statuses == [(1, ["finished"] * 2), ("1.0", ["missing"] * 2)]


def test_number_of_one_meaning_is_one_group(study: Callable[..., Study]) -> None:
    found = study("gradient_clip_val", [1], [1.0])
    assert found.axes == {}
    assert len(found.groups) == 1


def test_settings_of_shares() -> None:
    trainer = {"overfit_batches": 1.0, "val_check_interval": 1, "limit_val_batches": None, "limit_test_batches": 0.5}
    assert flatten({"trainer": trainer}) == {
        "trainer.overfit_batches": "1.0",
        "trainer.val_check_interval": 1,
        "trainer.limit_val_batches": "all",
        "trainer.limit_test_batches": 0.5,
    }
