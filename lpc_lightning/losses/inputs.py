"""Inputs that several losses share: the check of beta, and the log-ratios of policy and reference."""

import math

from torch import Tensor

from lpc_lightning.types import PairLogps


def check_beta(beta: float) -> None:
    """Check that `beta` is a finite number above 0. Any other value reverses, removes or breaks the loss.

    Raises:
        ValueError: `beta` is not above 0, or not finite.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta: found {beta}, expected a number above 0.")


def log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Compute r_w and r_l: log pi(y|x,z) - log pi_ref(y|x) of the chosen and of the rejected answer.

    Returns:
        Two tensors in nats, each (B,) or (B, K) like the policy's log-probabilities.

    Raises:
        ValueError: The reference's log-probabilities are missing.
    """
    if logps.reference_chosen is None or logps.reference_rejected is None:
        raise ValueError(
            "PairLogps: found no reference log-probabilities, expected those of both answers. "
            "DPO and IPO compare the policy with a reference; SimPO does not need one."
        )
    return logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected
