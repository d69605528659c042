"""Dr. DPO: pairs with a large loss have a small weight in their batch."""

from __future__ import annotations

import math

from torch import Tensor

from lpc_lightning.robust.base import RobustLoss


def dr_dpo_loss(losses: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Compute `-b' log mean exp(-loss / b')` over a batch, with b' the `temperature`.

    Its gradient is the mean of the pairs' gradients with weights proportional to exp(-loss / b').

    Source: Wu et al., 2024, arXiv 2407.07880, and its code (github.com/junkangwu/Dr_DPO).

    Args:
        losses: (B,) losses of the pairs.
        temperature: The paper's beta'. The mean of the losses is the limit for large values.
        weights: (B,) weights of the pairs in the mean. None: all are equal.
    """
    if weights is None:
        return -temperature * ((-losses / temperature).logsumexp(0) - math.log(len(losses)))
    known = weights.any()  # 0 if all weights are 0; as a tensor, because a branch would wait for the device
    logs = weights.to(losses.dtype).where(known, 1.0).log()
    return -temperature * ((logs - losses / temperature).logsumexp(0) - logs.logsumexp(0)) * known


class DrDPO(RobustLoss):
    """Distributionally robust loss of a batch (Dr. DPO, arXiv 2407.07880), for any algorithm: see `dr_dpo_loss`.

    An SFT term (`nll_weight`, ORPO) is averaged beside it. In the exponent, it would give pairs of unlikely texts
    almost no weight.
    """

    of_batch = True

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

    def batch_loss(self, losses: Tensor, weights: Tensor | None = None) -> Tensor:
        """Compute `dr_dpo_loss`."""
        return dr_dpo_loss(losses, self.temperature, weights)
