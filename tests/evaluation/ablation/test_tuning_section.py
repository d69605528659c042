"""Tests of the section `tune` of a grid, and of what it forbids in the rest of the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.grid import Grid
from tests.fixtures.tuned_grid import AXES, LR


@pytest.mark.parametrize("argument", [f"--{LR}=1e-5", "--model.optimizer.lr=1e-5"])
def test_arm_has_no_value_of_its_own(read: Callable[..., Grid], argument: str) -> None:
    latent = {"none": ["--latent=null"], "marginal": ["--latent=M", argument]}
    with pytest.raises(ConfigError, match=r"axes\.latent\.marginal: found --model.*, which sets the tuned axis lr"):
        read(axes={**AXES, "latent": latent})
    with pytest.raises(ConfigError, match=r"base: found --model.*, which sets the tuned axis lr"):
        read(base=[argument])
    with pytest.raises(ConfigError, match=r"change: found --model.*, which sets the tuned axis lr"):
        read().with_changes([argument.removeprefix("--")])
    with pytest.raises(ConfigError, match=r"skip: found .*, expected values for some of latent, seed"):
        read(skip=[{"latent": "none", "lr": [3e-3]}])


def test_cells_run_under_their_own_seeds(read: Callable[..., Grid]) -> None:
    message = r"{}: found --seed_everything=7, which replaces --seed_everything=1 of the axis seed, .* \(seed=VALUE\)"
    with pytest.raises(ConfigError, match=message.format(r"tune\.arguments")):
        read({"arguments": ["--seed_everything=7"]})
    with pytest.raises(ConfigError, match=message.format("change")):
        read().with_changes(["seed_everything=7"])


def test_tuned_value_comes_after_config_files(read: Callable[..., Grid]) -> None:
    """A config file of an arm may contain a learning rate."""
    grid = read().with_changes(["model=configs/algorithm/ipo.yaml"])
    assert [cell.arguments[-1] for cell in grid.tuning_cells(1e-3)] == [f"--{LR}=0.001"] * 4


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"values": [1e-3, 1e-4]}, r"tune\.values: found 0.001, 0.0001, expected positive numbers in rising order"),
        ({"values": [0, 1e-3]}, "expected positive numbers"),
        ({"values": ["a"]}, "expected positive numbers"),
        ({"values": 1e-3}, r"tune\.values: found 0.001, expected a list"),
        ({"seeds": [101, 101]}, r"tune\.seeds: found 101, 101, expected at least one seed, each seed once"),
        ({"by": "test/rewards/accuracies"}, r"tune\.by: found test/.*, expected a validation metric"),
        ({"mode": "most"}, r"tune\.mode: found most, expected max or min"),
        ({"widen": -1}, r"tune\.widen: found -1"),
        ({"arguments": ["lr=1"]}, r"tune\.arguments"),
        ({"arguments": [f"--{LR}=1"]}, r"tune\.arguments: found --model.*, which sets the tuned axis lr"),
        ({"axis": "rate"}, r"axes\.rate: found no such axis, expected key or arguments alone"),
        ({"axis": "seed"}, r"axes\.seed: found values, key, expected key or arguments alone"),
        ({"best": 1}, r"tune: found axis, values, seeds, by, best, expected axis, values, seeds, by, and optionally"),
    ],
)
def test_read_tuning_rejects_invalid_content(read: Callable[..., Grid], tune: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tune)


def test_tuning_needs_an_axis_of_seeds(read: Callable[..., Grid]) -> None:
    with pytest.raises(ConfigError, match="tune: found no axis seed"):
        read(axes={name: axis for name, axis in AXES.items() if name != "seed"})


def test_changes_of_the_section(read: Callable[..., Grid]) -> None:
    tune = read().with_changes(["lr=1e-4,1e-2", "tune.seeds=7", "tune.widen=0"]).tune
    assert tune is not None
    assert (tune.axis.values, tune.seeds, tune.widen) == ((1e-4, 1e-2), (7,), 0)
    with pytest.raises(ConfigError, match=r"found tune\.seed, expected values, seeds, by"):
        read().with_changes(["tune.seed=7"])
