"""Programs of `test_reference_processes.py`: runs on two devices, and a run that is killed."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback

from lpc_lightning.algorithms import DPO, FSDP2Strategy
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.reference import pair_pass
from lpc_lightning.reference.pair_cache import PairCache
from lpc_lightning.types import PreferenceBatch

pair_pass.BATCH_TOKENS, pair_pass.ROUNDS = 700, 2  # several batches and parts even for few pairs


class Losses(Callback):
    """Records the loss of each step on this device, and saves a checkpoint after the third."""

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint, self.values = checkpoint, []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.values.append(float(trainer.callback_metrics["train/loss"]))
        if self.checkpoint is not None and trainer.global_step == 3:
            trainer.save_checkpoint(self.checkpoint)


class Counted(DPO):
    """DPO that counts the batches in which this device computes the reference."""

    passes = 0

    def reference_step(self, batch: PreferenceBatch) -> torch.Tensor:
        self.passes += 1
        return super().reference_step(batch)


class Move(Callback):
    """Changes the policy at the start of the run, like a loaded checkpoint."""

    @torch.no_grad()
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        for parameter in pl_module.policy.parameters():
            parameter.mul_(1.1)


def fit(
    cache: str | Path,
    reference: str = "cached",
    devices: int = 1,
    strategy: Any = "auto",
    save: Path | None = None,
    resume: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> dict[str, Any]:
    """Train for one epoch of 22 pairs in batches of 4 over all devices, and validate on 5 pairs.

    Returns:
        Losses, cached values, number of reference batches on this device, and number of its parameters.
    """
    seed_everything(3, verbose=False)
    losses = Losses(save)
    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        devices=devices,
        strategy=strategy,
        callbacks=[losses, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        log_every_n_steps=1,
    )
    data = SyntheticPreferences(
        train_pairs=22, validation_pairs=5, test_pairs=5, batch_size=4 // devices, cache_dir=str(cache)
    )
    module = Counted(
        policy=TinyPolicy(width=16, layers=2, heads=2),
        reference=reference,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return {
        "losses": losses.values,
        "validation": float(trainer.callback_metrics["val/loss"]),
        "logps": [[pair.reference_logps for pair in data.pairs[stage]] for stage in data.stages],
        "passes": module.passes,
        "held": sum(
            getattr(tensor, "to_local", lambda tensor=tensor: tensor)().numel() for tensor in module.parameters()
        ),
    }


def two_devices(folder: Path) -> None:
    """Train as one of two processes, and write the results."""
    results = runs_of_two_devices(folder)
    torch.save(results, folder / f"rank {torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


def runs_of_two_devices(folder: Path) -> dict[str, Any]:
    """Train under both strategies: live, cached and reused references, and weights that change at the start."""
    values = {}
    for name in ("ddp", "fsdp"):

        def make(name: str = name) -> Any:
            return "ddp" if name == "ddp" else FSDP2Strategy()

        cache, checkpoint = folder / name, folder / f"{name}.ckpt"
        values[f"{name} live"] = fit(cache, "live", 2, make())
        values[f"{name} cached"] = fit(cache, "cached", 2, make(), save=checkpoint if name == "ddp" else None)
        values[f"{name} again"] = fit(cache, "cached", 2, make())
        empty(cache, folder / f"{name} kept")
        values[f"{name} moved"] = fit(cache, "cached", 2, make(), callbacks=(Move(),))
        values[f"{name} moved live"] = fit(cache, "live", 2, make(), callbacks=(Move(),))
    empty(folder / "ddp", folder / "second")
    values["ddp resumed"] = fit(folder / "ddp", "cached", 2, "ddp", resume=folder / "ddp.ckpt")
    return values


def empty(cache: Path, kept: Path) -> None:
    """Move the reference's cache to another folder."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        shutil.move(cache / "reference", kept / "reference")
    torch.distributed.barrier()


def fit_slowly(cache: Path) -> None:
    """Compute values in small parts until the process is killed."""
    pair_pass.BATCH_TOKENS, pair_pass.ROUNDS = 1, 1
    add = PairCache.add

    def add_and_wait(self: PairCache, *values: Any) -> None:
        add(self, *values)
        time.sleep(0.2)

    PairCache.add = add_and_wait  # type: ignore[method-assign]
    fit(cache)
