"""Position of a run between two optimizer steps, and Lightning's loop counts for it.

Lightning stores its counts as they are at the moment of saving: within a batch, before or after a validation, at the
end of an epoch or of the run. From some of these states it resumes at another batch, or skips a validation. Here the
counts are computed from the position alone. So they do not depend on the stops before the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer

from lpc_lightning.data.batching.loading import TrainingLoader


@dataclass(frozen=True)
class Position:
    """Number of micro-batches that are part of the weights.

    An epoch is complete after its validation. What Lightning does at the end of an epoch is not repeated after a
    resume.
    """

    epoch: int
    """Number of complete epochs."""
    batch: int
    """Number of micro-batches of the current epoch."""
    total: int
    """Number of micro-batches of the run."""
    before_validation: bool = False
    """True if the validation that follows these micro-batches has not ended."""

    def validates(self, trainer: Trainer) -> bool:
        """Return whether the trainer validates here, except for a validation at the end of the run.

        Args:
            trainer: The trainer. Its training batches must have been counted.
        """
        epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
        if not trainer.enable_validation or interval is None:  # None: validation by time
            return False
        if epochs is None:
            return self.total % interval == 0
        return (self.epoch + 1) % epochs == 0 and self.batch % interval == 0


def store_position(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Store the position of the last optimizer step, in the loop counts and in the data.

    Args:
        trainer: The trainer, during a fit. Without a `TrainingLoader`, nothing is changed.
        checkpoint: A checkpoint of this moment. It is changed.
    """
    if isinstance(loader := trainer.train_dataloader, TrainingLoader):
        order = loader.state_dict()
        position = _read_position(trainer, checkpoint["loops"], order["epoch"])
        _write_position(trainer, checkpoint["loops"], position)
        checkpoint |= {"epoch": position.epoch, "position": asdict(position)}
        checkpoint["training_data"] = order | {"epoch": position.epoch, "taken": position.batch}


def restore_position(trainer: Trainer, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Set the loop counts to those of the position where a run continues. Lightning reads them afterwards.

    Args:
        trainer: The trainer that resumes.
        checkpoint: A checkpoint with a position. Its loop counts are changed.

    Returns:
        The state of the loader at this position.
    """
    trainer.fit_loop.setup_data()  # counts the batches, as the schedules do a moment later
    position = _resume_position(trainer, checkpoint["position"])
    _write_position(trainer, checkpoint["loops"], position)
    return checkpoint["training_data"] | {"epoch": position.epoch, "taken": position.batch}


def _read_position(trainer: Trainer, loops: Mapping[str, Any], epoch: int) -> Position:
    """Return the position of the last optimizer step. Gradients that were accumulated since then are not stored.

    Args:
        trainer: The trainer, during a fit.
        loops: Entry `loops` of a checkpoint of this moment.
        epoch: Epoch of the loader's last micro-batch.
    """
    fit = loops["fit_loop"]
    counts, total = (fit["epoch_loop.batch_progress"][kind] for kind in ("current", "total"))
    done, batches = counts["processed"], trainer.num_training_batches
    since = 0 if done == batches else done % trainer.accumulate_grad_batches
    position = Position(epoch, done - since, total["processed"] - since)
    has_ended = fit["epoch_progress"]["current"]["processed"] > epoch
    # Lightning calls a batch complete after the hook `on_train_batch_end`.
    is_open = counts["completed"] < done or (trainer.validating and _is_within_validation(trainer, fit))
    if done and not since and not has_ended and is_open and position.validates(trainer):
        return Position(position.epoch, position.batch, position.total, before_validation=True)
    if position.batch == batches:
        return Position(epoch + 1, 0, position.total)
    return position


def _write_position(trainer: Trainer, loops: Mapping[str, Any], position: Position) -> None:
    """Set Lightning's loop counts to those of a position.

    Args:
        trainer: The trainer that writes the checkpoint or resumes from it. Its training batches must have been counted.
        loops: Entry `loops` of the checkpoint. It is changed.
        position: The position.
    """
    fit = loops["fit_loop"]
    epoch, batch, within = position.epoch, position.batch, position.batch > 0
    for counts in fit["epoch_progress"].values():
        counts.update(ready=epoch + 1, started=epoch + within, processed=epoch, completed=epoch)
    progress = fit["epoch_loop.batch_progress"]
    progress["is_last_batch"] = batch == trainer.num_training_batches
    for counts, done in ((progress["current"], batch), (progress["total"], position.total)):
        counts.update(ready=done, started=done, processed=done, completed=done)
    optimizer = fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    steps = {kind: counts["completed"] for kind, counts in optimizer["step"].items()}
    if not within:
        steps["current"] = 0
        fit["epoch_loop.scheduler_progress"]["current"].update(ready=0, completed=0)
    for kind, done in steps.items():
        optimizer["step"][kind].update(ready=done, completed=done)
        optimizer["zero_grad"][kind].update(ready=done, started=done, completed=done)
    # A validation that has started and not ended is repeated.
    started = int(position.before_validation)
    progress = fit["epoch_loop.val_loop.batch_progress"]
    progress["is_last_batch"] = False
    for counts in (progress["current"], progress["total"]):
        counts.update(ready=started, started=started, processed=0, completed=0)
    # The number of the step in the logs. Lightning adds 1 if it resumes where a validation is due.
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = steps["total"] - position.validates(trainer)
    fit["state_dict"].pop("combined_loader", None)  # the position in the data is stored with the data


def _resume_position(trainer: Trainer, stored: Mapping[str, Any]) -> Position:
    """Return the position where a run continues. It may have fewer micro-batches in an epoch than the run before.

    Args:
        trainer: The trainer that resumes. Its training batches must have been counted.
        stored: The position in the checkpoint, as a dictionary.
    """
    position = Position(**stored)
    if position.batch > trainer.num_training_batches or (
        position.batch == trainer.num_training_batches and not position.before_validation
    ):
        return Position(position.epoch + 1, 0, position.total)
    return position


def _is_within_validation(trainer: Trainer, fit: Mapping[str, Any]) -> bool:
    done = fit["epoch_loop.val_loop.batch_progress"]["current"]["completed"]
    return done < sum(trainer.num_val_batches)
