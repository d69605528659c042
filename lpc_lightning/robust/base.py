"""Base class of robust losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lpc_lightning.losses import weighted_mean
from lpc_lightning.types import PairLogps, PairLosses

PreferenceLoss: TypeAlias = Callable[[PairLogps], PairLosses]
"""Loss of an algorithm, such as `dpo_loss`."""


class RobustLoss:
    """A preference loss that tolerates wrong labels, made from the loss of an algorithm.

    A subclass changes the losses of the pairs (`pair_losses`), or their combination to the loss of a batch
    (`batch_loss`). The reliabilities of annotators are the only state. A loss without them keeps the other methods.
    """

    of_batch: bool = False
    """True if `batch_loss` compares the pairs of a batch, so that a batch needs several."""

    def pair_losses(self, loss: PreferenceLoss, logps: PairLogps, reliability: Tensor | None = None) -> PairLosses:
        """Compute the robust losses of pairs.

        Args:
            loss: The algorithm's loss.
            logps: Log-probabilities of the pairs, (B,) or (B, K).
            reliability: (B,) probability that a label of the pair's annotator is correct. None: not known.

        Raises:
            ValueError: The robust loss is not defined for this loss.
        """
        return loss(logps)

    def batch_loss(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """Compute the loss () of a micro-batch from the losses (B,) of its pairs.

        Args:
            losses: (B,) losses of the labels, without the SFT term and the latent's penalty. Their means are added.
            weights: (B,) weights of the pairs. None: all are equal.
        """
        return weighted_mean(losses, weights)

    def start(self, annotators: Sequence[str], device: torch.device) -> None:
        """Prepare for a run on a device, on pairs of these annotators. Known reliabilities are kept."""

    def reset(self) -> None:
        """Forget what a run has learned."""

    def reliabilities(self, annotators: Sequence[str], device: torch.device) -> Tensor | None:
        """Return (B,) the current reliability of each pair's annotator. None if the loss has no reliabilities."""
        return None

    def observe(self, annotators: Sequence[str], label_correct: Tensor) -> None:
        """Add the pairs of a micro-batch. They count from the next optimizer step.

        Args:
            annotators: (B,) annotators of the pairs.
            label_correct: (B,) probability that each label is correct.
        """

    def update(self) -> None:
        """Update the reliabilities, once for each optimizer step, from its pairs on all devices."""

    def metrics(self) -> dict[str, Tensor]:
        """Return metrics () of training, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint stores. Empty without reliabilities."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` has returned."""


def swap_answers(logps: PairLogps) -> PairLogps:
    """Return the log-probabilities of the same pairs with the opposite labels, and the same margins."""
    return PairLogps(
        policy_chosen=logps.policy_rejected,
        policy_rejected=logps.policy_chosen,
        reference_chosen=logps.reference_rejected,
        reference_rejected=logps.reference_chosen,
        chosen_lengths=logps.rejected_lengths,
        rejected_lengths=logps.chosen_lengths,
        target_margins=logps.target_margins,
    )
