"""Hölder-DPO: the gradient of a pair vanishes if the policy is sure that its label is wrong."""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor

from lpc_lightning.robust.base import PreferenceLoss, RobustLoss
from lpc_lightning.types import LossTerm, PairLogps, PairLosses


def holder_dpo_loss(log_likelihood: Tensor, gamma: float) -> Tensor:
    """Compute `-(1 + gamma) p^gamma + gamma p^(1 + gamma)`, with p the likelihood of the label.

    For DPO, p = sigmoid(beta D). The derivative with respect to beta D is `-gamma (1 + gamma) p^gamma (1 - p)^2`. It
    falls to 0 for large margins of either sign.

    Source: Fujisawa et al., 2025, arXiv 2505.17859, with the density power divergence as the member of their family.

    Args:
        log_likelihood: Log-likelihoods of the labels, of any shape.
        gamma: The paper's gamma, above 0.

    Returns:
        Losses from -1 (p = 1) to 0 (p = 0).
    """
    return gamma * ((1 + gamma) * log_likelihood).exp() - (1 + gamma) * (gamma * log_likelihood).exp()


class HolderDPO(RobustLoss):
    """Hölder-DPO (arXiv 2505.17859), for losses that are negative log-likelihoods: see `holder_dpo_loss`."""

    def __init__(self, gamma: float = 2.0) -> None:
        """Store the setting.

        Args:
            gamma: Strength of the robustness, above 0.

        Raises:
            ValueError: `gamma` is not above 0.
        """
        if not 0 < gamma < math.inf:
            raise ValueError(f"robust_loss.gamma: found {gamma}, expected a number above 0.")
        self.gamma = gamma

    def pair_losses(self, loss: PreferenceLoss, logps: PairLogps, reliability: Tensor | None = None) -> PairLosses:
        """Compute `holder_dpo_loss`. For a mixture of codes, p is the likelihood under the mixture.

        Raises:
            ValueError: The loss is not a negative log-likelihood.
        """
        pairs = loss(logps)
        if pairs.log_likelihood is not None or pairs.parts:
            raise ValueError(
                "robust_loss: found HolderDPO with a loss that is not a negative log-likelihood, expected DPO or SimPO."
            )
        likelihood, function = pairs.label_log_likelihood, partial(holder_dpo_loss, gamma=self.gamma)
        rewards = pairs.chosen_rewards, pairs.rejected_rewards
        return PairLosses(function(likelihood), *rewards, likelihood, parts=(LossTerm(likelihood, function),))
