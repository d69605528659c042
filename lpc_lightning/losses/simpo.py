"""Simple Preference Optimization, which needs no reference."""

from torch.nn.functional import logsigmoid

from lpc_lightning.losses.inputs import check_beta
from lpc_lightning.types import PairLogps, PairLosses


def simpo_loss(logps: PairLogps, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> PairLosses:
    """Compute the SimPO loss (Meng et al., 2024, arXiv 2405.14734, eq. 6).

    `-log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l) - gamma / beta))`. Each mean runs over the tokens of one
    answer.

    Args:
        logps: Log-probabilities of the pairs. Those of the reference are ignored.
        beta: Scale of the length-averaged log-probabilities.
        gamma_beta_ratio: Target margin gamma, in units of beta.

    Raises:
        ValueError: `beta` is out of range.
    """
    check_beta(beta)
    chosen = logps.policy_chosen / logps.chosen_lengths
    rejected = logps.policy_rejected / logps.rejected_lengths
    losses = -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())
