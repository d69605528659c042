"""Training losses that stay on the device until they are checked, so that no step waits for its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lpc_lightning.algorithms.metrics import fetch

MAX_UNREAD = 1024
"""Largest number of unread losses. They are then checked even if no step is logged."""


@dataclass(frozen=True, slots=True)
class _Loss:
    value: Tensor
    step: int
    epoch: int
    batch: int
    ids: Sequence[str]


class RecentLosses:
    """Losses since the last check, with the position of each in the run.

    They are checked when a step is logged, before a validation, before a checkpoint is written and at the end of
    training. So no checkpoint holds weights that a non-finite loss has damaged.
    """

    def __init__(self) -> None:
        """Create an empty list."""
        self._losses: list[_Loss] = []

    def add(self, value: Tensor, step: int, epoch: int, batch: int, ids: Sequence[str]) -> None:
        """Add the loss of a micro-batch. It stays on its device."""
        self._losses.append(_Loss(value.detach(), step, epoch, batch, ids))
        if len(self._losses) >= MAX_UNREAD:
            self.check()

    def unread(self) -> dict[str, Tensor]:
        """Return all losses since the last check, by the names that `check` expects."""
        return {f"unread/{number}": loss.value for number, loss in enumerate(self._losses)}

    def check(self, values: Mapping[str, Tensor] | None = None) -> None:
        """Check that all losses since the last check are finite.

        Args:
            values: The losses of `unread`, copied to the CPU. None: they are copied now.

        Raises:
            FloatingPointError: A loss is not finite. Later checks raise the same error.
        """
        if values is None:
            values = fetch(self.unread())
        for loss, value in zip(self._losses, values.values(), strict=True):
            if not value.isfinite():
                raise FloatingPointError(
                    f"train/loss: found {value.item()} at step {loss.step} (epoch {loss.epoch}, batch {loss.batch}, "
                    f"pairs {', '.join(loss.ids)}), expected a finite number. Lower the learning rates "
                    "(model.optimizer, model.latent_lr) or latent.init_logit_std, set trainer.gradient_clip_val, or "
                    "use a wider trainer.precision. The last checkpoint is valid."
                )
        self._losses.clear()
