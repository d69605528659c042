"""Preference losses: pure functions from `PairLogps` to `PairLosses`.

In the formulas, r_w and r_l are the log-ratios log pi(y|x,z) - log pi_ref(y|x) of the chosen and the rejected answer.

A pair may have a margin m, in units of the reward (beta D, and for SimPO beta times the difference of the means). The
loss then asks for a reward difference that is larger by m. For DPO this is DPO with an offset (ODPO, Amini et al.,
2024, arXiv 2402.10571): beta D becomes beta D - m. The loss of the opposite label, which label smoothing and robust
losses use, asks the same of the other answer: -beta D - m. The rewards do not contain the margin. Without margins,
every loss is that of its paper.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
    logits, opposite = (logits, -logits) if logps.margins is None else (logits - logps.margins, -logits - logps.margins)
    agree, disagree = -logsigmoid(logits), -logsigmoid(opposite)
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if not robust or not label_smoothing:
        return PairLosses((1 - label_smoothing) * agree + label_smoothing * disagree, *rewards)
    kept, flipped = ((1 - label_smoothing) / (1 - 2 * label_smoothing), -label_smoothing / (1 - 2 * label_smoothing))
    if logps.margins is None:
        log_likelihood = (label_smoothing + (1 - 2 * label_smoothing) * logits.sigmoid()).log()
    else:  # the probabilities of the two labels do not add up to 1
        log_likelihood = torch.logaddexp(math.log1p(-label_smoothing) - agree, math.log(label_smoothing) - disagree)
    parts = ((kept, -agree), (flipped, -disagree))
    return PairLosses(kept * agree + flipped * disagree, *rewards, log_likelihood, parts=parts)


def ipo_loss(logps: PairLogps, beta: float = 0.1, length_average: bool = False) -> PairLosses:
    """Compute the IPO loss (Azar et al., 2023, arXiv 2310.12036, eq. 17): `(D - 1 / (2 beta))^2` with D = r_w - r_l.

    Implementations disagree on averaging. The original DPO repository and OpenRLHF, on which the LPC paper was trained,
    sum over tokens (the default here). TRL averages since January 2024 (`length_average`).

    The IPO loss is not a negative log-likelihood. Before training it is 1 / (2 beta)^2, which is 25 for beta = 0.1. On
    that scale a prior over codes would have no effect. So the label's log-likelihood is the negative loss divided by
    that value: -(D / target - 1)^2 nats, with the target 1 / (2 beta). A label then costs one nat before training. In
    DPO it costs log 2 nats.

    A margin m moves the target of the reward difference beta D from 1/2 to 1/2 + m: `(D - (1/2 + m) / beta)^2`. The
    scale of the nats stays. IPO's derivation has no such term; m = 0 is IPO.

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
    difference = chosen - rejected if logps.margins is None else chosen - rejected - logps.margins / beta
    losses = (difference - 1 / (2 * beta)).square()
    nats = (2 * beta) ** 2
    log_likelihood = -nats * losses
    rewards = beta * chosen.detach(), beta * rejected.detach()
    return PairLosses(losses, *rewards, log_likelihood, parts=((1 / nats, log_likelihood),))


def simpo_loss(logps: PairLogps, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> PairLosses:
    """Compute the SimPO loss (Meng et al., 2024, arXiv 2405.14734, eq. 6).

    `-log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l) - gamma / beta))`. Each mean runs over the tokens of one
    answer. A pair's margin is added to gamma. With `gamma_beta_ratio` 0 it is the pair's target margin alone.

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
    logits = beta * (chosen - rejected - gamma_beta_ratio)
    losses = -logsigmoid(logits if logps.margins is None else logits - logps.margins)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def add_nll(pairs: PairLosses, logps: PairLogps, weight: float) -> PairLosses:
    """Add `weight` times the chosen answer's mean negative log-likelihood per token, the SFT term of RPO.

    Source: Pang et al., 2024, arXiv 2404.19733, eq. 1.

    In the loss of a mixture of codes, the likelihood of the whole answer is averaged over the codes. The log-likelihood
    of the label does not change, so the answer's text has no influence on the posterior.

    Args:
        pairs: Result of a preference loss.
        logps: The log-probabilities that the loss was computed from.
        weight: The paper's alpha.
    """
    label = pairs.label_log_likelihood
    text = (weight / logps.chosen_lengths.flatten(), logps.policy_chosen)
    losses = pairs.losses - weight * logps.policy_chosen / logps.chosen_lengths
    return replace(pairs, losses=losses, log_likelihood=label, parts=(*(pairs.parts or ((1.0, label),)), text))


def weighted_mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Compute sum(w_i l_i) / sum(w_i) over pairs. 0 if all weights are 0. The plain mean if `weights` is None."""
    if weights is None:
        return losses.mean()
    weights = weights.to(losses.dtype)
    total = weights.sum()
    return (weights * losses).sum() / total.where(total > 0, 1.0)


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
