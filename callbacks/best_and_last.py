"""The two checkpoints of a run: the best validated state and the last state."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lpc_lightning.distributed.sharded_checkpoint import put_in_place, remove_checkpoint
from lpc_lightning.errors import CheckpointError
from lpc_lightning.inference.checkpoints import read_checkpoint


class BestAndLast(ModelCheckpoint):
    """Callback that writes `best.ckpt` and `last.ckpt`, and remembers the best state across a resume.

    `best.ckpt` has the best value of a validation metric. `last.ckpt` is written at every validation, at the end of an
    epoch without one, and at the end of the run. It is written again at the end of an epoch that `EarlyStopping` or
    `WeightAveraging` counts there. Lightning's `save_last` writes it only if the metric has improved.

    A run that is resumed into another folder gets a copy of the earlier `best.ckpt`, and replaces it only by a better
    state. Lightning would compare with the states of the new folder only.
    """

    def __init__(self, monitor: str = "val/rewards/accuracies", mode: str = "max") -> None:
        """Keep the settings.

        Args:
            monitor: Metric of the validation that decides which state is the best.
            mode: `max` if a larger value is better, `min` if a smaller one is.
        """
        # After the validation: at the end of the epoch, `last.ckpt` would be written without the new best score.
        super().__init__(
            filename="best",
            monitor=monitor,
            mode=mode,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._best_step = 0
        self._saved_step: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `best.ckpt` if the metric has improved, then `last.ckpt`."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        candidate = trainer.callback_metrics.get(self.monitor or "")
        if self.check_monitor_top_k(trainer, candidate):
            self._best_step = trainer.global_step
        super().on_validation_end(trainer, pl_module)
        self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `last.ckpt` if the epoch has ended without a validation, or a callback has changed after it."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning's connector
        if any(_changes_at_epoch_end(each, trainer.current_epoch) for each in callbacks):
            self._saved_step = None
        self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report that there is no `best.ckpt` if the run has never validated."""
        super().on_train_end(trainer, pl_module)
        if not (self.best_model_path or _is_trial(trainer)):
            rank_zero_info(
                "checkpoint: this run had no validation, so that there is no best.ckpt. Use last.ckpt. For a best one, "
                "set trainer.limit_val_batches above 0, and give the data validation pairs: data.validation_share or "
                "data.validation_split, for the built-in data data.validation_pairs."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return Lightning's state, and the step of the best checkpoint."""
        return super().state_dict() | {"best_step": self._best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, including the current score, which Lightning leaves out."""
        super().load_state_dict(state_dict)
        self.current_score, self._best_step = state_dict["current_score"], state_dict["best_step"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adapt the state in a checkpoint to the folder of this run, and copy the best checkpoint into it."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None or state["dirpath"] == self.dirpath or self.dirpath is None or "://" in str(self.dirpath):
            return
        state["dirpath"] = self.dirpath
        if trainer.state.fn != TrainerFn.FITTING or not state["best_model_path"]:
            return
        best = Path(state["best_model_path"])
        beside = Path(str(trainer.ckpt_path)).with_name(best.name)  # the folder may have been moved
        earlier = next((path for path in (best, beside) if _step_of(path) == state["best_step"]), None)
        if earlier is None:
            rank_zero_warn(
                f"checkpoint: found no {best} of step {state['best_step']}, expected the best one before the resume. "
                "The best state is now that of the steps from here on."
            )
            state |= BestAndLast(str(self.monitor), self.mode).state_dict() | {"dirpath": self.dirpath}
            return
        target = Path(self.dirpath) / best.name
        if trainer.is_global_zero:
            _copy(earlier, target)
        trainer.strategy.barrier("best checkpoint")
        state["best_model_path"] = state["kth_best_model_path"] = str(target)
        state["best_k_models"] = {str(target): state["best_model_score"]}

    def _save_last(self, trainer: Trainer) -> None:
        if _is_trial(trainer) or self._saved_step == trainer.global_step or self.dirpath is None:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(Path(self.dirpath) / f"last{self.FILE_EXTENSION}", weights_only=False)


def _is_trial(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by Lightning's connector


def _changes_at_epoch_end(callback: Callback, epoch: int) -> bool:
    """Return true if the callback may count the epoch only after the validation at its end."""
    if isinstance(callback, WeightAveraging):
        return callback.should_update(epoch_idx=epoch)
    return isinstance(callback, EarlyStopping)


def _step_of(path: Path) -> int | None:
    try:
        return int(read_checkpoint(path, weights=False)["global_step"])
    except (CheckpointError, KeyError, TypeError):
        return None


def _copy(source: Path, target: Path) -> None:
    """Copy a checkpoint beside its target and rename it, unless both paths lead to the same one.

    A file is linked where the file system can: both names then stand for the same bytes.
    """
    if target.exists() and source.samefile(target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    remove_checkpoint(partial)  # left behind by a process that was killed here
    if source.is_dir():
        shutil.copytree(source, partial)
    else:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copy2(source, partial)
    put_in_place(partial, target)
