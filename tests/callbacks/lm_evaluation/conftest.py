"""Task of nine questions, and fits of a tiny policy that are evaluated on it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.algorithms import DPO
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.latent import GumbelSpace
from lpc_lightning.policy import TinyPolicy

QUESTIONS = [
    {"question": f"Which number follows {number}?", "choices": [str(number + step) for step in (1, 7, 2)]}
    for number in range(9)
]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def write_task(folder: Path, name: str, code: str | None = None) -> str:
    """Write a task file with nine questions of three choices. `code` is the body of `process_results(doc, results)`."""
    folder = folder / name
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": 0, "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }  # fmt: skip
    text = yaml.safe_dump(task)
    if code is not None:
        (folder / "own.py").write_text(f"def process_results(doc, results):\n    {code}\n")
        text += "process_results: !function own.process_results\n"
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """File of a task whose data set is prepared once."""
    return write_task(tmp_path_factory.mktemp("tasks"), "numbers")


class Losses(Callback):
    """Callback that stores the loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def gumbel() -> GumbelSpace:
    return GumbelSpace(num_codes=4, hidden=8, init_logit_std=1.0)


@pytest.fixture
def fit(tmp_path: Path, cache_dir: Path) -> Callable[..., Trainer]:
    """Function that runs a fit: 20 pairs, 2 in a micro-batch, 2 micro-batches in a step, 5 steps in an epoch."""

    def run(name: str, *callbacks: Callback, module: DPO | None = None, **trainer: Any) -> Trainer:
        data = SyntheticPreferences(train_pairs=20, validation_pairs=6, batch_size=2, cache_dir=str(cache_dir))
        policy = TinyPolicy(width=16, layers=1, heads=2)
        module = module or DPO(policy=policy, latent=gumbel(), optimizer=adam, latent_lr=1e-2)
        ckpt_path = trainer.pop("ckpt_path", None)
        settings: dict[str, Any] = {
            "logger": CSVLogger(tmp_path, name="", version=name),
            "accumulate_grad_batches": 2,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "accelerator": "cpu",
        }
        finished = Trainer(callbacks=list(callbacks), **(settings | trainer))
        finished.fit(module, data, ckpt_path=ckpt_path)
        return finished

    return run


def rows(folder: Path) -> list[dict[str, str]]:
    """Read the rows of the CSV logger, without empty cells."""
    with (folder / "metrics.csv").open() as file:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
