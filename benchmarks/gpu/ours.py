"""Our side: `lpc-lightning fit` as its users run it, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.gpu.cases import Case
from benchmarks.gpu.clock import StepClock
from benchmarks.gpu.guard import ROOT
from benchmarks.recorder import reference_of
from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.types import PreferenceBatch

CONFIGS = ROOT / "configs"
SEED, BETA, LEARNING_RATE = 0, 0.1, 1e-6
LEFT_OUT = ("BestAndLast", "FinalValidation", "WritePredictions")
"""Default callbacks that have nothing to do in a run without validation and checkpoints."""


class StepRecorder(Callback):
    """Times the steps, and keeps shapes and losses, without waiting for the device."""

    def __init__(self, limit: float) -> None:
        """Keep the limit.

        Args:
            limit: Seconds after which training stops at the end of a step.
        """
        self.limit = limit
        self.shapes: list[tuple[int, ...]] = []
        """Rows, row width and read positions of each batch."""
        self.pairs: list[list[str]] = []
        """Ids of each batch's pairs."""
        self.losses: list[torch.Tensor] = []
        """(B,) losses of each step."""
        self.first: dict[str, float] = {}
        """Metrics of the first step."""
        self.reference: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.reference = reference_of(pl_module)
        self.clock = StepClock(pl_module.device.type)
        self.clock.mark()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Note the batch."""
        self.shapes.append((*batch.input_ids.shape, len(batch.read_at)))
        self.pairs.append(list(batch.ids))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Note the step."""
        self.losses.append(outputs["losses"].detach().clone())
        if not self.first:  # a step of the warm-up, which may wait
            self.first = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.clock.mark()
        if self.clock.host[-1] - self.clock.host[0] > self.limit:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release weights and moments. The trainer would copy them to the CPU, for seconds that belong to no step."""
        trainer.strategy.optimizers = []
        for parameter in pl_module.parameters():
            parameter.data, parameter.grad = torch.empty(0), None


def fit(case: Case, lengths: Path, scratch: Path, device: str, extra: Callback | None = None) -> StepRecorder:
    """Train and return what was recorded.

    Args:
        case: What to train.
        lengths: File of the pairs' lengths.
        scratch: Folder for caches and the run.
        device: `cpu` or `cuda`.
        extra: One more callback, which is not part of the command.
    """
    cli = OneFit(arguments(case, lengths, scratch, device), extra)
    callbacks: list[Callback] = cli.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
    return next(each for each in callbacks if isinstance(each, StepRecorder))


class OneFit(PreferenceCLI):
    """`lpc-lightning fit` with a callback object that no config names."""

    def __init__(self, arguments: list[str], extra: Callback | None) -> None:
        """Parse and run.

        Args:
            arguments: Of the command.
            extra: The callback.
        """
        self._extra = extra
        super().__init__(arguments)

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """Add the callback behind those of the config."""
        trainer = super().instantiate_trainer(**options)
        if self._extra is not None:
            trainer.callbacks.append(self._extra)  # type: ignore[attr-defined]  # set by Lightning's connector
        return trainer


def arguments(case: Case, lengths: Path, scratch: Path, device: str) -> list[str]:
    """Return the arguments of `lpc-lightning`: the defaults of configs/, without validation and checkpoints."""
    from benchmarks.gpu.models import SHAPES

    callbacks = yaml.safe_load((CONFIGS / "callbacks" / "default.yaml").read_text())
    callbacks = [each for each in callbacks if each["class_path"].rpartition(".")[2] not in LEFT_OUT]
    callbacks.append({"class_path": "benchmarks.gpu.ours.StepRecorder", "init_args": {"limit": case.limit}})
    settings: dict[str, Any] = {
        "trainer": CONFIGS / "trainer" / ("gpu.yaml" if device == "cuda" else "cpu.yaml"),
        "trainer.precision": case.precision,
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_steps": case.steps,
        "trainer.default_root_dir": scratch / "runs",
        "trainer.num_sanity_val_steps": 0,
        "trainer.limit_val_batches": 0,
        "trainer.enable_checkpointing": "false",
        "policy": "benchmarks.gpu.models.RandomLlama",
        "policy.shape": case.shape,
        "policy.dtype": "bfloat16" if case.precision == "bf16-true" else "float32",
        "policy.attention": case.attention,
        "policy.compile": str(case.compiled).lower(),
        "policy.cuda_graphs": str(case.cuda_graphs).lower(),
        "policy.gradient_checkpointing": str(case.checkpointing).lower(),
        "data": "benchmarks.gpu.pairs.RandomTokens",
        "data.lengths": lengths,
        "data.vocabulary": SHAPES[case.shape]["vocab_size"],
        "data.batch_size": case.pairs,
        "data.cache_dir": scratch,
        "model": "DPO",
        "model.beta": BETA,
        "model.optimizer.lr": LEARNING_RATE,
        "model.warmup_ratio": 0.0,
        "seed_everything": SEED,
        "callbacks": json.dumps(callbacks),
    }
    if case.latent is not None:
        settings["latent"] = CONFIGS / "latent" / f"{case.latent}.yaml"
    return ["fit", *(f"--{name}={value}" for name, value in settings.items())]
