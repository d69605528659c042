"""Rows, pairs of a stage, and a run of a trainer."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import PreferenceData, PreferenceDataModule
from lpc_lightning.policy import TinyPolicy

Row = dict[str, str]


def tiny(**policy: Any) -> TinyPolicy:
    return TinyPolicy(**({"width": 16, "layers": 1, "heads": 2} | policy))


def row(number: int, **columns: str) -> Row:
    return {"prompt": f"Question {number}?", "chosen": f"Good {number}.", "rejected": f"Bad {number}."} | columns


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., PreferenceData]:
    """Return a function that makes a `PreferenceData` with a temporary cache."""

    def make(path: Any, **settings: Any) -> PreferenceData:
        path = {name: str(file) for name, file in path.items()} if isinstance(path, dict) else str(path)
        return PreferenceData(path, cache_dir=str(tmp_path / "cache"), **({"batch_size": 4} | settings))

    return make


def ids(data: PreferenceDataModule, stage: Any) -> list[str]:
    pairs = data.load(stage, tiny().load_tokenizer())
    return [] if pairs is None else [pair.id for pair in pairs]


def prompts(data: PreferenceDataModule, stage: Any) -> list[str]:
    tokenizer = tiny().load_tokenizer()
    pairs = data.load(stage, tokenizer)
    assert pairs is not None
    return [tokenizer.decode(pair.prompt_ids) for pair in pairs]


class Fit:
    """A run of one epoch, with the data metrics of its metrics.csv."""

    def __init__(self, folder: Path, data: PreferenceDataModule, **policy: Any) -> None:
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        logger = CSVLogger(folder, name="", version="run")
        trainer = Trainer(accelerator="cpu", logger=logger, max_epochs=1, log_every_n_steps=1, **quiet)
        trainer.fit(DPO(policy=tiny(**policy)), datamodule=data)
        with (folder / "run" / "metrics.csv").open() as file:
            cells = [(name, float(value)) for line in csv.DictReader(file) for name, value in line.items() if value]
        self.trainer = trainer
        self.metrics = {name: value for name, value in cells if name.startswith("data/")}
