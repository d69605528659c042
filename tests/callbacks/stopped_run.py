"""A run of 12 steps over 3 epochs in a process of its own, which ends it at a given step by a signal."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import BestAndLast, FinalValidation, GracefulStop, LabelFlipNoise
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.distributed.checkpoint_io import AtomicCheckpointIO
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder
from lpc_lightning.latent import Exponential, GumbelSpace
from lpc_lightning.policy import TinyPolicy

STEPS = 12
SIGTERM_EXIT_CODE = 143


class Stop(NamedTuple):
    """A signal that a run receives."""

    step: int
    """Optimizer step during which the signal arrives, from 1."""
    signal: int


class Kill(Callback):
    """Sends a signal to its own process: in the last micro-batch of a step, after all other callbacks."""

    def __init__(self, stop: Stop) -> None:
        self.stop = stop

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.stop.step:
            os.kill(os.getpid(), self.stop.signal)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def fit(folder: Path, cache: Path, stop: Stop | None = None, **trainer: Any) -> None:
    """Start or resume the run in a folder. The metrics of all attempts are joined if it ends.

    An epoch has 8 micro-batches of 2 pairs, the last one short, and 4 steps.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    cell = CellFolder(folder)
    folder.mkdir(exist_ok=True)
    checkpoint = cell.checkpoint()
    cell.prepare_fit(checkpoint)
    seed_everything(1, verbose=False)
    latent = GumbelSpace(
        num_codes=4, hidden=8, init_logit_std=1.0, tau=Exponential(1.0, 0.2), g=None, warm_start_pairs=15
    )
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), optimizer=adam, latent=latent, latent_lr=1e-2)
    data = SyntheticPreferences(
        train_pairs=15, validation_pairs=6, test_pairs=0, batch_size=2, cache_dir=str(cache / "tokens")
    )
    callbacks = [
        BestAndLast(),
        LearningRateMonitor("step"),
        FinalValidation(),
        GracefulStop(),
        LabelFlipNoise(rate=0.3),
        *([Kill(stop)] if stop else []),
    ]
    settings: dict[str, Any] = {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 4}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    settings |= {"accelerator": "cpu", "num_sanity_val_steps": 0, "plugins": [AtomicCheckpointIO()]}
    logger = CSVLogger(folder, name="", version="run", flush_logs_every_n_steps=1)
    fitter = Trainer(logger=logger, callbacks=callbacks, **(settings | trainer))
    try:
        fitter.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SIGTERMException:
        raise SystemExit(SIGTERM_EXIT_CODE) from None
    cell.join_metrics()


def run_in_child(folder: Path, cache: Path, stop: Stop | None, trainer: dict[str, Any]) -> None:
    """Run `fit`, with its output in a file."""
    log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    fit(folder, cache, stop, **trainer)
