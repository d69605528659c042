"""Our side's recorder: a callback that any `lpc-lightning fit` takes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.recording import Recording
from lpc_lightning.callbacks.step_parts import StepParts
from lpc_lightning.reference.cached import CachedReference
from lpc_lightning.types import PreferenceBatch


class StepRecorder(Callback):
    """Writes when each step ended, its loss, margin and pairs, and the peak memory, at the end of the run.

    One batch a step: for benchmarks, which do not accumulate.
    """

    def __init__(self, output: str, split: bool = False) -> None:
        """Keep the settings.

        Args:
            output: JSON file to write.
            split: Also time the parts of a step. That costs a little time itself.
        """
        self.output, self.recording = output, Recording()
        self.split = split
        self.parts: StepParts | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the time of the reference so far, and start to time the parts."""
        self.recording.reference = reference_of(pl_module)
        if self.split:
            self.parts = StepParts(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Start the clock of the batch, whose data has arrived."""
        if self.parts is not None:
            self.parts.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PreferenceBatch, batch_idx: int
    ) -> None:
        """Record the step."""
        metrics = trainer.callback_metrics
        self.recording.end_step(float(metrics["train/loss"]), float(metrics["train/rewards/margins"]), list(batch.ids))
        if self.parts is not None:
            self.parts.end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        if self.parts is not None:
            self.parts.close()
            self.recording.shares = self.parts.seconds()
        self.recording.write(self.output)


def reference_of(module: Any) -> dict[str, Any]:
    """Return the time of the reference (see `Recording.reference`)."""
    passes = list(module.reference.passes.values()) if isinstance(module.reference, CachedReference) else []
    return {
        "in_step": module.reference is not None and not isinstance(module.reference, CachedReference),
        "pairs": sum(each.pairs for each in passes),
        "seconds": sum(each.seconds for each in passes),
    }
