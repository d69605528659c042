"""Dr. DPO: pairs with a large loss have a small weight in their batch."""

from __future__ import annotations

import math

from torch import Tensor

from lpc_lightning.robust.base import RobustLoss


def dr_dpo_loss(losses: Tensor, temperature: float) -> Tensor:
    """Compute `-b' log mean exp(-loss / b')` over a batch, with b' the `temperature`.

    Its gradient is the mean of the pairs' gradients with weights proportional to exp(-loss / b').

    Source: Wu et al., 2024, arXiv 2407.07880, and its code (github.com/junkangwu/Dr_DPO).

    Args:
        losses: (B,) losses of the pairs.
        temperature: The paper's beta'. The mean of the losses is the limit for large values.
    """
    return -temperature * ((-losses / temperature).logsumexp(0) - math.log(len(losses)))


class DrDPO(RobustLoss):
    """Distributionally robust loss of a batch (Dr. DPO, arXiv 2407.07880), for any algorithm: see `dr_dpo_loss`."""

    def __init__(self, temperature: float = 1.0) -> None:
        """Store the setting.

        Args:
            temperature: The paper's beta', in units of the loss. Smaller values leave out more pairs. The batch is a
                micro-batch of one device (data.batch_size), as in the paper's code. It should hold several pairs.

        Raises:
            ValueError: `temperature` is not above 0.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"robust_loss.temperature: found {temperature}, expected a number above 0.")
        self.temperature = temperature

    def batch_loss(self, losses: Tensor) -> Tensor:
        """Compute `dr_dpo_loss`."""
        return dr_dpo_loss(losses, self.temperature)
