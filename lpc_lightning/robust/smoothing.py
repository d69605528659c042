"""Losses for a known rate of wrong labels: conservative (cDPO) and unbiased (rDPO)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lpc_lightning.robust.base import PreferenceLoss, RobustLoss, swap_answers
from lpc_lightning.types import LossTerm, PairLogps, PairLosses


def conservative_losses(observed: PairLosses, opposite: PairLosses, rate: float) -> PairLosses:
    """Compute `(1 - rate) l + rate l'`, with l the loss of the label and l' that of the opposite label.

    For DPO this is cDPO (Mitchell, 2023).

    Args:
        observed: Losses of the labels.
        opposite: Losses of the opposite labels.
        rate: Expected share of wrong labels, 0 to 0.5.
    """

    def mean(first: Tensor, second: Tensor) -> Tensor:
        return (1 - rate) * first + rate * second

    parts: list[LossTerm] = []
    for term, other in zip(observed.parts, opposite.parts, strict=True):
        if term.loss is other.loss is torch.neg and term.weight == other.weight:
            parts.append(replace(term, log_likelihood=mean(term.log_likelihood, other.log_likelihood)))
        else:  # KTO's terms are not linear, and an answer's text is divided by its length
            parts += [term.scaled(1 - rate), other.scaled(rate)]
    first, second = observed.log_likelihood, opposite.log_likelihood
    likelihood = None if first is None or second is None else mean(first, second)
    losses = mean(observed.losses, opposite.losses)
    return replace(observed, losses=losses, log_likelihood=likelihood, parts=tuple(parts), label_losses=None)


def unbiased_losses(observed: PairLosses, opposite: PairLosses, rate: float) -> PairLosses:
    """Compute `[(1 - rate) l - rate l'] / (1 - 2 rate)`, whose mean over flips at this rate is the clean loss.

    For DPO this is rDPO (Chowdhury et al., 2024, arXiv 2403.00409, eq. 12).

    The loss is not a negative log-likelihood. DPO's falls without bound as D grows. If exp(-loss) were used as a
    likelihood, the codes would follow every label, including the wrong ones. So the loss of a mixture of codes averages
    each of the two likelihoods over the codes separately, which keeps the loss unbiased. The likelihood of a label
    under a code is that of labels that flip at this rate: for DPO, `(1 - rate) sigmoid(beta D) + rate sigmoid(-beta
    D)`.

    Args:
        observed: Losses of the labels.
        opposite: Losses of the opposite labels.
        rate: Share of wrong labels, 0 to below 0.5.
    """
    if not rate:
        return observed
    kept, flipped = (1 - rate) / (1 - 2 * rate), -rate / (1 - 2 * rate)
    parts = [term.scaled(kept) for term in observed.terms] + [term.scaled(flipped) for term in opposite.terms]
    likelihood = torch.logaddexp(
        math.log1p(-rate) + observed.label_log_likelihood, math.log(rate) + opposite.label_log_likelihood
    )
    losses = kept * observed.losses + flipped * opposite.losses
    return replace(observed, losses=losses, log_likelihood=likelihood, parts=tuple(parts), label_losses=None)


class ConservativeLoss(RobustLoss):
    """Label smoothing (cDPO) of any algorithm's loss: see `conservative_losses`."""

    def __init__(self, rate: float) -> None:
        """Store the setting.

        Args:
            rate: Expected share of wrong labels, 0 to 0.5.

        Raises:
            ValueError: `rate` is out of range.
        """
        if not 0 <= rate <= 0.5:
            raise ValueError(f"robust_loss.rate: found {rate}, expected a share from 0 to 0.5.")
        self.rate = rate

    def pair_losses(self, loss: PreferenceLoss, logps: PairLogps, reliability: Tensor | None = None) -> PairLosses:
        """Compute `conservative_losses`."""
        return conservative_losses(loss(logps), loss(swap_answers(logps)), self.rate)


class UnbiasedLoss(RobustLoss):
    """Unbiased loss (rDPO) of any algorithm: see `unbiased_losses`."""

    def __init__(self, rate: float) -> None:
        """Store the setting.

        Args:
            rate: Share of wrong labels, 0 to below 0.5.

        Raises:
            ValueError: `rate` is out of range.
        """
        if not 0 <= rate < 0.5:
            raise ValueError(f"robust_loss.rate: found {rate}, expected a share from 0 to below 0.5.")
        self.rate = rate

    def pair_losses(self, loss: PreferenceLoss, logps: PairLogps, reliability: Tensor | None = None) -> PairLosses:
        """Compute `unbiased_losses`."""
        return unbiased_losses(loss(logps), loss(swap_answers(logps)), self.rate)
