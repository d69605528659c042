"""Training losses that have not been read yet, so that no step waits for its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lpc_lightning.algorithms.metrics import fetch

MOST = 1024
"""Losses after which they are read, whether or not a step is logged."""


@dataclass(frozen=True, slots=True)
class _Loss:
    value: Tensor
    step: int
    epoch: int
    batch: int
    ids: Sequence[str]


class RecentLosses:
    """The losses since they were last read, and where each of them stands in the run.

    They are read when a step is logged, before a validation, before a checkpoint is written and at the end of training:
    no checkpoint holds weights that a non-finite loss has spoiled.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._losses: list[_Loss] = []

    def add(self, value: Tensor, step: int, epoch: int, batch: int, ids: Sequence[str]) -> None:
        """Keep the loss of a micro-batch, which stays on its device."""
        self._losses.append(_Loss(value.detach(), step, epoch, batch, ids))
        if len(self._losses) >= MOST:
            self.check()

    def unread(self) -> dict[str, Tensor]:
        """All losses since the last check, by a name that `check` expects them under."""
        return {f"unread/{number}": loss.value for number, loss in enumerate(self._losses)}

    def check(self, read: Mapping[str, Tensor] | None = None) -> None:
        """Look at all losses since the last check.

        Args:
            read: `unread`, copied to the CPU. None: they are copied now.

        Raises:
            FloatingPointError: One of them is not finite. Further checks raise the same.
        """
        values = fetch(self.unread()) if read is None else read
        for loss, value in zip(self._losses, values.values(), strict=True):
            if not value.isfinite():
                raise FloatingPointError(
                    f"train/loss: found {value.item()} at step {loss.step} (epoch {loss.epoch}, batch {loss.batch}, "
                    f"pairs {', '.join(loss.ids)}), expected a finite number. Lower the learning rates "
                    "(model.optimizer, model.latent_lr) or latent.init_logit_std, set trainer.gradient_clip_val, or "
                    "take a wider trainer.precision; the last checkpoint is whole."
                )
        self._losses.clear()
