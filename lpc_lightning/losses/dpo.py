"""Direct Preference Optimization, with its two answers to noisy labels."""

from torch.nn.functional import logsigmoid

from lpc_lightning.losses.checks import check_beta
from lpc_lightning.losses.log_ratios import log_ratios
from lpc_lightning.types import PairLogps, PairLosses


def dpo_loss(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0, robust: bool = False) -> PairLosses:
    """DPO (Rafailov et al., 2023, arXiv 2305.18290, eq. 7), with D = r_w - r_l and eps = `label_smoothing`.

    - plain: `-log sigmoid(beta D)`
    - eps > 0, conservative DPO (Mitchell, 2023): `-(1-eps) log sigmoid(beta D) - eps log sigmoid(-beta D)`
    - `robust`, rDPO (Chowdhury et al., 2024, arXiv 2403.00409, eq. 12):
      `[-(1-eps) log sigmoid(beta D) + eps log sigmoid(-beta D)] / (1 - 2 eps)`, unbiased under label flips at rate eps

    rDPO's loss is no negative log-likelihood: it falls without end as D grows, and by exp(-loss) the codes would follow
    every label, wrong ones included. So each of the two likelihoods of which it is made is averaged over the codes,
    which leaves the loss of a mixture unbiased as well; and what a label says of a code is its likelihood where labels
    flip at rate eps, `(1-eps) sigmoid(beta D) + eps sigmoid(-beta D)`.

    Args:
        logps: Log-probabilities of the pairs, the reference's among them.
        beta: Strength of the pull towards the reference, per nat.
        label_smoothing: Share of labels believed to be flipped, 0 to 0.5.
        robust: Take the unbiased rDPO estimate in place of cDPO's smoothed one. Needs `label_smoothing` below 0.5.

    Raises:
        ValueError: `beta` or `label_smoothing` is out of range, or the reference is missing.
    """
    check_beta(beta)
    top = "below 0.5" if robust else "at most 0.5"
    if not 0.0 <= label_smoothing <= 0.5 or (robust and label_smoothing == 0.5):
        raise ValueError(f"label_smoothing: found {label_smoothing}, expected a share from 0 and {top}.")
    chosen, rejected = log_ratios(logps)
    logits = beta * (chosen - rejected)
    agree, disagree = -logsigmoid(logits), -logsigmoid(-logits)
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if not robust or not label_smoothing:
        return PairLosses((1 - label_smoothing) * agree + label_smoothing * disagree, *rewards)
    kept, flipped = ((1 - label_smoothing) / (1 - 2 * label_smoothing), -label_smoothing / (1 - 2 * label_smoothing))
    said = (label_smoothing + (1 - 2 * label_smoothing) * logits.sigmoid()).log()
    return PairLosses(kept * agree + flipped * disagree, *rewards, said, parts=((kept, -agree), (flipped, -disagree)))
