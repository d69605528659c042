"""How far the policy has moved from its reference on each answer."""

from torch import Tensor

from lpc_lightning.types import PairLogps


def log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """r_w and r_l: log pi(y|x,z) - log pi_ref(y|x) of the chosen and of the rejected answer.

    Returns:
        Two tensors, each (B,) or (B, K) like the policy's log-probabilities, in nats.

    Raises:
        ValueError: The reference's log-probabilities are missing.
    """
    if logps.reference_chosen is None or logps.reference_rejected is None:
        raise ValueError(
            "PairLogps: found no reference log-probabilities, expected those of both answers. "
            "DPO and IPO measure the policy against a reference; SimPO does without one."
        )
    return logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected
