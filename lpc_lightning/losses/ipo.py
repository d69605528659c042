"""Identity Preference Optimization."""

from lpc_lightning.losses.checks import check_beta
from lpc_lightning.losses.log_ratios import log_ratios
from lpc_lightning.types import PairLogps, PairLosses


def ipo_loss(logps: PairLogps, beta: float = 0.1, length_average: bool = False) -> PairLosses:
    """IPO (Azar et al., 2023, arXiv 2310.12036, eq. 17): `(D - 1 / (2 beta))^2` with D = r_w - r_l.

    Implementations disagree on averaging: the original DPO repository and OpenRLHF, on which the LPC paper was
    trained, sum over tokens (the default here); TRL averages since January 2024 (`length_average`).

    It is no negative log-likelihood, and 1 / (2 beta)^2 large where nothing is learned yet: 25 for beta = 0.1, against
    which a prior over codes would count for nothing. As evidence it is therefore measured by that value, which makes it
    (D / target - 1)^2 nats: a label under a policy that has not moved costs one nat, as it costs log 2 in DPO.

    Args:
        logps: Log-probabilities of the pairs, the reference's among them.
        beta: The paper's tau: the margin that the loss aims at is 1 / (2 beta) nats.
        length_average: Divide r_w and r_l by their own answers' tokens first.

    Raises:
        ValueError: `beta` is out of range, or the reference is missing.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(logps)
    if length_average:
        chosen, rejected = chosen / logps.chosen_lengths, rejected / logps.rejected_lengths
    losses = (chosen - rejected - 1 / (2 * beta)).square()
    nats = (2 * beta) ** 2
    said = -nats * losses
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach(), said, parts=((1 / nats, said),))
