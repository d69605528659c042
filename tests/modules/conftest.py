"""Whole training runs of tiny policies on the built-in preferences, by real trainers, and what they logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger

from lpc_lightning.data import PreferenceDataModule, SyntheticPreferences
from lpc_lightning.modules import PreferenceModule
from lpc_lightning.policy import TinyPolicy

Values = dict[str, float]


class Log(Logger):
    """Keeps what it is told, with the step at which it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, Values]] = []

    @property
    def name(self) -> str:
        return "log"

    @property
    def version(self) -> int:
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def having(self, prefix: str) -> dict[int, Values]:
        """By step, the metrics whose names begin so."""
        found: dict[int, Values] = {}
        for step, metrics in self.rows:
            if chosen := {name: value for name, value in metrics.items() if name.startswith(prefix)}:
                found.setdefault(step, {}).update(chosen)
        return found


class Watch(Callback):
    """The pairs of each micro-batch, and what the optimizer was set to at each of its steps."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, ...]] = []
        self.steps: list[Values] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch.ids)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.steps.append({group["name"]: group["lr"] for group in optimizer.param_groups})


@dataclass
class Run:
    """A finished run."""

    trainer: Trainer
    module: PreferenceModule
    log: Log
    watch: Watch

    @property
    def batches(self) -> list[tuple[str, ...]]:
        """The pairs of each micro-batch, by their ids."""
        return self.watch.batches

    @property
    def optimizer(self) -> list[Values]:
        """Learning rates of each optimizer step."""
        return self.watch.steps

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """All parameters, frozen ones included."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    @property
    def training(self) -> dict[int, Values]:
        """Everything logged of training, by step."""
        return self.log.having("train/")

    @property
    def losses(self) -> list[float]:
        """train/loss of each optimizer step."""
        return [values["train/loss"] for _, values in sorted(self.training.items())]


FitRun = Callable[..., Run]


@pytest.fixture(autouse=True)
def restored_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """`seed_everything` writes the environment: put it back after each test."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


@pytest.fixture(scope="session")
def small_policy() -> Callable[..., TinyPolicy]:
    """A policy of one layer, as a spec."""

    def spec(**settings: Any) -> TinyPolicy:
        return TinyPolicy(**({"width": 16, "layers": 1, "heads": 2} | settings))

    return spec


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A token cache that the tests of a session share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small_data(cache_dir: Path) -> Callable[..., SyntheticPreferences]:
    """21 training pairs, in micro-batches of 2: 11 in an epoch, the last of them short."""

    def data(**settings: Any) -> SyntheticPreferences:
        sizes: dict[str, Any] = {"train_pairs": 21, "validation_pairs": 6, "test_pairs": 5, "batch_size": 2}
        return SyntheticPreferences(**(sizes | {"cache_dir": str(cache_dir)} | settings))

    return data


@pytest.fixture(scope="session")
def fit_run(small_data: Callable[..., SyntheticPreferences]) -> FitRun:
    """Seeds everything, trains, and tells what happened."""

    def run(
        module: PreferenceModule,
        data: PreferenceDataModule | None = None,
        seed: int = 1,
        ckpt_path: str | Path | None = None,
        callbacks: list[Callback] | None = None,
        **trainer: Any,
    ) -> Run:
        quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
        quiet |= {"log_every_n_steps": 1, "accelerator": "cpu"}
        quiet["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks or [])
        log, watch = Log(), Watch()
        seed_everything(seed, verbose=False)
        fitter = Trainer(logger=log, callbacks=[*(callbacks or []), watch], **(quiet | trainer))
        fitter.fit(module, datamodule=data or small_data(), ckpt_path=ckpt_path)
        return Run(fitter, module, log, watch)

    return run
