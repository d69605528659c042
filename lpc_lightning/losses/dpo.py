"""Direct Preference Optimization, with two variants for noisy labels."""

from torch.nn.functional import logsigmoid

from lpc_lightning.losses.inputs import check_beta, log_ratios
from lpc_lightning.types import PairLogps, PairLosses


def dpo_loss(logps: PairLogps, beta: float = 0.1, label_smoothing: float = 0.0, robust: bool = False) -> PairLosses:
    """Compute the DPO loss (Rafailov et al., 2023, arXiv 2305.18290, eq. 7).

    With D = r_w - r_l and eps = `label_smoothing`:

    - plain: `-log sigmoid(beta D)`
    - eps > 0, conservative DPO (Mitchell, 2023): `-(1-eps) log sigmoid(beta D) - eps log sigmoid(-beta D)`
    - `robust`, rDPO (Chowdhury et al., 2024, arXiv 2403.00409, eq. 12):
      `[-(1-eps) log sigmoid(beta D) + eps log sigmoid(-beta D)] / (1 - 2 eps)`, unbiased under label flips at rate eps

    The rDPO loss is not a negative log-likelihood. It falls without bound as D grows. If exp(-loss) were used as a
    likelihood, the codes would follow every label, including the wrong ones. So the loss of a mixture of codes averages
    each of the two likelihoods over the codes separately, which keeps the loss unbiased. The likelihood of a label
    under a code is that of labels that flip at rate eps, `(1-eps) sigmoid(beta D) + eps sigmoid(-beta D)`.

    Args:
        logps: Log-probabilities of the pairs under policy and reference.
        beta: Strength of the pull towards the reference, per nat.
        label_smoothing: Expected share of flipped labels, 0 to 0.5.
        robust: Use the unbiased rDPO loss instead of the smoothed cDPO loss. Needs `label_smoothing` below 0.5.

    Raises:
        ValueError: `beta` or `label_smoothing` is out of range, or the reference is missing.
    """
    check_beta(beta)
    limit = "below 0.5" if robust else "at most 0.5"
    if not 0.0 <= label_smoothing <= 0.5 or (robust and label_smoothing == 0.5):
        raise ValueError(f"label_smoothing: found {label_smoothing}, expected a share from 0 and {limit}.")
    chosen, rejected = log_ratios(logps)
    logits = beta * (chosen - rejected)
    agree, disagree = -logsigmoid(logits), -logsigmoid(-logits)
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if not robust or not label_smoothing:
        return PairLosses((1 - label_smoothing) * agree + label_smoothing * disagree, *rewards)
    kept, flipped = ((1 - label_smoothing) / (1 - 2 * label_smoothing), -label_smoothing / (1 - 2 * label_smoothing))
    log_likelihood = (label_smoothing + (1 - 2 * label_smoothing) * logits.sigmoid()).log()
    parts = ((kept, -agree), (flipped, -disagree))
    return PairLosses(kept * agree + flipped * disagree, *rewards, log_likelihood, parts=parts)
