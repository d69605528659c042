"""Tests of the seeds of cells whose grid has no axis `seed`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lpc_lightning.evaluation.report.contents import read_contents

METRIC = "val/rewards/accuracies"
VALUES = {"none": 0.5, "marginal": 0.7}


@pytest.fixture
def grids(write_ablation: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """Function that writes a grid of two latents for each seed, each in a folder of its own."""

    def write(*seeds: int | bool) -> str:
        for number, seed in enumerate(seeds):
            folder = tmp_path / "grids" / str(number)
            shutil.copytree(write_ablation({"latent": list(VALUES)}, [None], lambda latent, _: VALUES[latent]), folder)
            for path in folder.glob("cells/*/run/config.yaml"):
                path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"seed_everything": seed}))
        return str(tmp_path / "grids")

    return write


def test_seed_without_an_axis_is_that_of_the_run(grids: Callable[..., str]) -> None:
    contents = read_contents([grids(1, 2)], None, [METRIC], None)
    groups = contents.subject.study.groups
    assert [group.axes for group in groups] == [{"latent": "none"}, {"latent": "marginal"}]
    assert [len(group.values(METRIC)) for group in groups] == [2, 2]
    (contrast,) = contents.subject.contrasts
    assert contrast.difference is not None
    assert (contrast.difference.estimate.n, contrast.unpaired) == (2, ())
    assert [entry for entry in contents.left_out if entry.status in ("repeated", "missing")] == []


def test_repeated_seed_without_an_axis(grids: Callable[..., str]) -> None:
    contents = read_contents([grids(1, 1)], None, [METRIC], None)
    assert [len(group.values(METRIC)) for group in contents.subject.study.groups] == [1, 1]
    assert [entry.status for entry in contents.left_out if entry.status != "no test"] == ["repeated", "repeated"]


def test_cells_of_unknown_seeds_count_by_folder(grids: Callable[..., str]) -> None:
    """Seeds are unknown, for example, in runs of `seed_everything: true`. None of these runs is paired with another."""
    contents = read_contents([grids(True, True)], None, [METRIC], None)
    assert [len(group.values(METRIC)) for group in contents.subject.study.groups] == [2, 2]
    (contrast,) = contents.subject.contrasts
    assert contrast.difference is None
    assert len(contrast.unpaired) == 4
    assert [entry for entry in contents.left_out if entry.status == "repeated"] == []
