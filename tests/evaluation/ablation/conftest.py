"""Fixtures: a small grid of real fits, its results without interruptions, and a tuned grid."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from lpc_lightning.evaluation.ablation.command import ablate
from lpc_lightning.evaluation.ablation.grids.grid import Grid, read_grid
from tests.fixtures.tuned_grid import AXES, TUNE

BASE = {
    "model": "DPO",
    "model.optimizer.lr": "1e-2",
    "policy": "TinyPolicy",
    "policy.width": "16",
    "policy.layers": "1",
    "policy.heads": "2",
    "data": "SyntheticPreferences",
    "data.train_pairs": "24",
    "data.validation_pairs": "4",
    "data.test_pairs": "4",
    "data.batch_size": "2",
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_epochs": "2",
    "trainer.num_sanity_val_steps": "0",
    "trainer.log_every_n_steps": "1",
    "trainer.enable_model_summary": "false",
}
CALLBACKS = [
    "--callbacks+=lpc_lightning.callbacks.GracefulStop",
    "--callbacks+=lpc_lightning.callbacks.PreferenceAccuracy",
    "--callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--callbacks.every_n_train_steps=3",
    "--callbacks.save_last=true",
]


@pytest.fixture(scope="session")
def write_grid() -> Callable[[Path], Path]:
    """Function that writes the file of a grid with four cells. Its caches are in the same folder."""

    def write(folder: Path) -> Path:
        base = [*(f"--{name}={value}" for name, value in BASE.items()), *CALLBACKS]
        grid = {
            "base": [*base, f"--data.cache_dir={folder / 'cache'}"],
            "axes": {
                "latent": {"none": ["--latent=null"], "gumbel": ["--latent=GumbelSpace", "--latent.num_codes=4"]},
                "noise": {
                    "values": [0, 0.5],
                    "arguments": ["--callbacks+=lpc_lightning.callbacks.LabelFlipNoise", "--callbacks.rate={value}"],
                },
                "seed": {"values": [1], "key": "seed_everything"},
            },
        }
        path = folder / "small.yaml"
        path.write_text(yaml.safe_dump(grid, sort_keys=False))
        return path

    return write


@pytest.fixture
def grid(write_grid: Callable[[Path], Path], tmp_path: Path) -> Path:
    """File of the grid, in a new folder."""
    return write_grid(tmp_path)


Results = dict[str, bytes]


def results_in(output: Path) -> Results:
    """Return the content of `results.json` of every cell, by the name of the cell."""
    return {path.parent.name: path.read_bytes() for path in sorted(output.glob("cells/*/results.json"))}


@pytest.fixture(scope="session")
def read_results() -> Callable[[Path], Results]:
    """The function `results_in`."""
    return results_in


@pytest.fixture(scope="session")
def uninterrupted(write_grid: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a grid whose cells ran one after the other, without interruption.

    The processes of pytest-xdist share it: the first one runs the cells, and the others skip them as finished.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "uninterrupted"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        assert ablate([str(write_grid(folder))], output=str(folder / "out"), threads=1)
    return folder / "out"


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Grid]:
    """Function that reads the grid with changes of its section `tune` and of its other keys."""

    def read(tune: dict[str, Any] | None = None, **content: Any) -> Grid:
        path = tmp_path / "grid.yaml"
        grid = {"base": ["--config=a.yaml"], "axes": AXES, "tune": {**TUNE, **(tune or {})}, **content}
        path.write_text(yaml.safe_dump(grid, sort_keys=False))
        return read_grid(path)

    return read
