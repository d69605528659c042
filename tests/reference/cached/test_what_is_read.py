"""Tests that values are computed only for pairs that the run will read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lpc_lightning.algorithms import DPO


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


class Reads(Callback):
    """Records the pairs that the data module announces and the pairs that the run reads."""

    def __init__(self) -> None:
        self.announced: dict[str, set[str]] = {}
        self.read: dict[str, set[str]] = {"train": set(), "validation": set()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.announced = {stage: {data.pairs[stage][index].id for index in data.reads(stage)} for stage in data.stages}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.read["train"].update(batch.ids)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.read["validation"].update(batch.ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "pairs"),
    [
        ({"max_epochs": 1}, (21, 6)),
        ({"max_steps": 3}, (6, 6)),
        ({"max_steps": 3, "limit_val_batches": 1}, (6, 2)),
        ({"max_steps": 2, "accumulate_grad_batches": 3}, (12, 6)),
        ({"max_steps": 30}, (21, 6)),
        ({"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 0}, (8, 0)),
        ({"max_epochs": 1, "limit_train_batches": 0.5, "limit_val_batches": 0.4}, (10, 2)),
        ({"max_epochs": 3, "max_steps": 2}, (4, 6)),
        ({"fast_dev_run": 2}, (4, 4)),
    ],
    ids=str,
)
def test_only_pairs_of_the_run_are_computed(
    settings: dict[str, Any], pairs: tuple[int, int], small_policy: Any, own_data: Any, fit_run: Any, parts: Any
) -> None:
    reads, data = Reads(), own_data()
    fit_run(DPO(policy=small_policy()), data, callbacks=[reads], num_sanity_val_steps=-1, **settings)
    assert reads.announced == reads.read
    assert (len(reads.read["train"]), len(reads.read["validation"])) == pairs
    stored = sum(len(np.load(part)["indices"]) for part in parts())
    assert stored == sum(pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3, "limit_train_batches": 4},
        {"max_steps": 12, "limit_train_batches": 5},
        {"max_steps": 4, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 3})], "limit_train_batches": 3},
    ],
    ids=["by epochs", "by steps", "by steps that grow"],
)
def test_partial_epochs_are_covered(settings: dict[str, Any], small_policy: Any, own_data: Any, fit_run: Any) -> None:
    reads = Reads()
    settings = settings | {"callbacks": [reads, *settings.get("callbacks", [])]}
    fit_run(DPO(policy=small_policy()), own_data(), **settings)
    assert reads.announced["train"] >= reads.read["train"]
    assert 8 < len(reads.read["train"]) < 21


def test_longer_run_adds_missing_values(small_policy: Any, own_data: Any, fit_run: Any, log_lines: Any) -> None:
    def run(steps: int) -> Any:
        module = DPO(policy=small_policy(), optimizer=adam, lr_schedule="constant_with_warmup", warmup_ratio=0.0)
        return fit_run(module, own_data(), max_steps=steps, limit_val_batches=0)

    short, whole = run(3), run(11)
    assert [line.partition(" in ")[0] for line in log_lines()] == [
        "train: 0 pairs reused, 6 computed",
        "validation: 0 pairs reused, none computed.",
        "train: 6 pairs reused, 15 computed",
        "validation: 0 pairs reused, none computed.",
    ]
    assert whole.losses[:3] == short.losses
