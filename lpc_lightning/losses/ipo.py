"""Identity Preference Optimization."""

from lpc_lightning.losses.inputs import check_beta, log_ratios
from lpc_lightning.types import PairLogps, PairLosses


def ipo_loss(logps: PairLogps, beta: float = 0.1, length_average: bool = False) -> PairLosses:
    """Compute the IPO loss (Azar et al., 2023, arXiv 2310.12036, eq. 17): `(D - 1 / (2 beta))^2` with D = r_w - r_l.

    Implementations disagree on averaging. The original DPO repository and OpenRLHF, on which the LPC paper was trained,
    sum over tokens (the default here). TRL averages since January 2024 (`length_average`).

    The IPO loss is not a negative log-likelihood. Before training it is 1 / (2 beta)^2, which is 25 for beta = 0.1. On
    that scale a prior over codes would have no effect. So the label's log-likelihood is the negative loss divided by
    that value: -(D / target - 1)^2 nats, with the target 1 / (2 beta). A label then costs one nat before training. In
    DPO it costs log 2 nats.

    Args:
        logps: Log-probabilities of the pairs under policy and reference.
        beta: The paper's tau. The target margin of the loss is 1 / (2 beta) nats.
        length_average: Divide r_w and r_l by the number of tokens of their answers first.

    Raises:
        ValueError: `beta` is out of range, or the reference is missing.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(logps)
    if length_average:
        chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    nats = (2 * beta) ** 2
    log_likelihood = -nats * losses
    rewards = beta * chosen.detach(), beta * rejected.detach()
    return PairLosses(losses, *rewards, log_likelihood, parts=((1 / nats, log_likelihood),))
