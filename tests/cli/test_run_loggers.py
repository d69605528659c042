"""Tests of the loggers of a run: which there are, and where they write."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, LitLogger, Logger, TensorBoardLogger

from lpc_lightning.cli.run_loggers import build_logger, run_loggers
from lpc_lightning.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "logger"
BUILT_IN = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}


def from_file(name: str, folder: Path) -> Logger:
    """Build the logger of a file in `configs/logger/`."""
    return build_logger(folder, BUILT_IN[name], **yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["init_args"])


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (None, [CSVLogger, TensorBoardLogger]),
        (["csv"], [CSVLogger]),
        (["tensorboard"], [CSVLogger, TensorBoardLogger]),
        (["tensorboard", "csv"], [CSVLogger, TensorBoardLogger]),
    ],
)
def test_run_loggers_write_to_the_run_folder(names: list[str] | None, classes: list[type], tmp_path: Path) -> None:
    folder = tmp_path / "version_3"
    given = None if names is None else [from_file(name, folder) for name in names]
    loggers = run_loggers(folder, given)
    assert [type(each) for each in loggers] == classes
    assert {Path(each.log_dir) for each in loggers} == {folder}
    assert Trainer(logger=loggers, accelerator="cpu").log_dir == str(folder)


def test_logger_with_a_version_keeps_its_place(tmp_path: Path) -> None:
    elsewhere = build_logger(
        tmp_path / "version_3", TensorBoardLogger, save_dir=tmp_path / "boards", name="a", version="b"
    )
    rows, board = run_loggers(tmp_path / "version_3", elsewhere)
    assert Path(str(rows.log_dir)) == tmp_path / "version_3"
    assert Path(str(board.log_dir)) == tmp_path / "boards" / "a" / "b"


@pytest.mark.skipif(find_spec("litlogger") is not None, reason="litlogger is installed")
def test_absent_package_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.logger: found LitLogger, whose package is not .*\[loggers\]"):
        build_logger(tmp_path, LitLogger)
