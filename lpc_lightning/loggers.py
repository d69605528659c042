"""Run folder of a trainer. Pictures, texts and tables for all its loggers, each in the form that it takes."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from PIL import Image

from lpc_lightning.files.markdown import markdown_table

Rows = Sequence[Sequence[Any]]


def run_folder(trainer: Trainer) -> Path:
    """Return the folder that a run writes to.

    This is a collective call: all processes must make it, before a branch on the rank (`is_global_zero`).
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


def log_picture(trainer: Trainer, name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """Log a picture (height, width, 3) to each logger that takes pictures."""
    for form in _forms(trainer):
        form.picture(name, pixels, step)


def log_text(trainer: Trainer, name: str, text: str, step: int) -> None:
    """Log a text in Markdown to each logger that takes texts."""
    for form in _forms(trainer):
        form.text(name, text, step)


def log_table(trainer: Trainer, name: str, columns: Sequence[str], rows: Rows) -> None:
    """Log a table to each logger that takes tables, at the trainer's step. A cell is a string, a number or None."""
    for form in _forms(trainer):
        form.table(name, columns, rows, trainer.global_step)


def viewers(trainer: Trainer) -> list[str]:
    """Return a line for each logger whose records a command opens: the name of the program and the command."""
    return [line for form in _forms(trainer) if (line := form.viewer())]


class LoggerForm:
    """Form of what a logger takes besides metrics and hyperparameters. The base class is for one that takes nothing.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Log a picture (height, width, 3)."""

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text in Markdown."""

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Log a table."""

    def viewer(self) -> str:
        """Return the command that shows the records, or nothing."""
        return ""


class TensorBoardForm(LoggerForm):
    """Images, and texts in Markdown. A table is a text."""

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add an image."""
        self.logger.experiment.add_image(name, pixels, step, dataformats="HWC")

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text."""
        self.logger.experiment.add_text(name, text, step)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Add a table in Markdown."""
        self.text(name, markdown_table(columns, [list(map(_cell, row)) for row in rows]), step)

    def viewer(self) -> str:
        """Return the command of TensorBoard."""
        return f"TensorBoard: {_program('tensorboard')} --logdir {self.logger.log_dir}"


class WandbForm(LoggerForm):
    """Images and tables. A text is a table of one cell."""

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Log an image."""
        self.logger.log_image(name, [pixels], step)

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text."""
        self.logger.log_text(name, ["text"], [[text]], step=step)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Log a table."""
        self.logger.log_table(name, list(columns), [list(row) for row in rows], step=step)


class MLFlowForm(LoggerForm):
    """Artifacts of the run: PNG, Markdown, and JSON that MLflow shows as a table."""

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Write `NAME_step_N.png`."""
        self.logger.experiment.log_image(self.logger.run_id, pixels, _file(name, step, "png"))

    def text(self, name: str, text: str, step: int) -> None:
        """Write `NAME_step_N.md`."""
        self.logger.experiment.log_text(self.logger.run_id, text, _file(name, step, "md"))

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Write `NAME_step_N.json`."""
        values = {column: [row[number] for row in rows] for number, column in enumerate(columns)}
        self.logger.experiment.log_table(self.logger.run_id, values, _file(name, step, "json"))

    def viewer(self) -> str:
        """Return the command of MLflow's server."""
        return f"MLflow: {_program('mlflow')} ui --backend-store-uri {self.logger.experiment.tracking_uri}"


class CometForm(LoggerForm):
    """Images, texts and tables of the experiment."""

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Log an image."""
        # Comet would scale an array to its own range of values.
        self.logger.experiment.log_image(Image.fromarray(pixels), name, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        """Log a text."""
        self.logger.experiment.log_text(text, step=step, metadata={"name": name})

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Log a table as a CSV file."""
        self.logger.experiment.log_table(
            _file(name, step, "csv"), tabular_data=[list(row) for row in rows], headers=list(columns)
        )


FORMS: dict[type[Logger], type[LoggerForm]] = {
    TensorBoardLogger: TensorBoardForm,
    WandbLogger: WandbForm,
    MLFlowLogger: MLFlowForm,
    CometLogger: CometForm,
}
"""Form for each class of loggers, subclasses included. Other loggers get metrics and hyperparameters only."""


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _forms(trainer: Trainer) -> list[LoggerForm]:
    """Return the form of each logger. Only the first process logs."""
    if not trainer.is_global_zero:
        return []
    return [
        next((FORMS[base] for base in type(logger).__mro__ if base in FORMS), LoggerForm)(logger)
        for logger in trainer.loggers
    ]


def _file(name: str, step: int, suffix: str) -> str:
    return f"{name}_step_{step:06d}.{suffix}"


def _program(name: str) -> str:
    """Return how to call a program of this environment from here, even if the environment is not activated."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).with_name(name))
