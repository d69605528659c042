"""Preference losses: pure functions from `PairLogps` to `PairLosses`.

In the formulas, r_w and r_l are the log-ratios log pi(y|x,z) - log pi_ref(y|x) of the chosen and the rejected answer.

A pair may have a target margin m, in units of the reward (beta D, and for SimPO beta times the difference of the
means). The loss is then that of a reward difference that is smaller by m. For DPO this is DPO with an offset (ODPO,
Amini et al., 2024, arXiv 2402.10571): beta D becomes beta D - m. The loss of the opposite label, which robust losses
use, has the same margin for the other answer: -beta D - m. The rewards do not contain the margin. Without margins,
every loss is that of its paper.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lpc_lightning.types import LossTerm, PairLogps, PairLosses


def dpo_loss(logps: PairLogps, beta: float = 0.1) -> PairLosses:
    """Compute the DPO loss (Rafailov et al., 2023, arXiv 2305.18290, eq. 7): `-log sigmoid(beta D)` with D = r_w - r_l.

    Args:
        logps: Log-probabilities of the pairs under policy and reference.
        beta: Strength of the pull towards the reference, per nat.

    Raises:
        ValueError: `beta` is out of range, or the reference is missing.
    """
    check_beta(beta)
    chosen, rejected = log_ratios(logps)
    logits = beta * (chosen - rejected)
    losses = -logsigmoid(logits if logps.target_margins is None else logits - logps.target_margins)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


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
    difference = chosen - rejected if logps.target_margins is None else chosen - rejected - logps.target_margins / beta
    losses = (difference - 1 / (2 * beta)).square()
    nats = (2 * beta) ** 2
    log_likelihood = -nats * losses
    rewards = beta * chosen.detach(), beta * rejected.detach()
    return PairLosses(losses, *rewards, log_likelihood, parts=(LossTerm(log_likelihood, weight=1 / nats),))


def simpo_loss(logps: PairLogps, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> PairLosses:
    """Compute the SimPO loss (Meng et al., 2024, arXiv 2405.14734, eq. 6).

    `-log sigmoid(beta (mean log pi(y_w) - mean log pi(y_l) - gamma / beta))`. Each mean runs over the tokens of one
    answer. A pair's margin is added to gamma. With `gamma_beta_ratio` 0 it is the pair's target margin alone.

    Args:
        logps: Log-probabilities of the pairs. Those of the reference are ignored.
        beta: Scale of the length-averaged log-probabilities.
        gamma_beta_ratio: Target margin gamma, in units of beta.

    Raises:
        ValueError: A setting is out of range.
    """
    check_beta(beta)
    if not math.isfinite(gamma_beta_ratio):
        raise ValueError(f"gamma_beta_ratio: found {gamma_beta_ratio}, expected a finite number.")
    chosen = logps.policy_chosen / logps.chosen_lengths
    rejected = logps.policy_rejected / logps.rejected_lengths
    logits = beta * (chosen - rejected - gamma_beta_ratio)
    losses = -logsigmoid(logits if logps.target_margins is None else logits - logps.target_margins)
    return PairLosses(losses, beta * chosen.detach(), beta * rejected.detach())


def kto_loss(
    logps: PairLogps,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reference_point: float = 0.0,
) -> PairLosses:
    """Compute the KTO loss (Ethayarajh et al., 2024, arXiv 2402.01306, eq. 7) of two answers that are judged alone.

    The chosen answer is desirable, the rejected one undesirable, each compared with the reference point z0. The loss is
    the mean over both answers:
    `[desirable_weight (1 - sigmoid(beta (r_w - z0))) + undesirable_weight (1 - sigmoid(beta (z0 - r_l)))] / 2`.

    The paper estimates z0, the KL between policy and reference, at every step from prompts with the answers to other
    prompts of the batch. Here z0 is a constant. An estimate needs another pass of policy and reference. It would also
    make a pair's loss depend on the other pairs of its batch, so that neither its validation loss nor its posterior
    over codes would be defined. With z0 = 0, the KL before training, this is APO-zero (D'Oosterlinck et al., 2024,
    arXiv 2408.06266, eq. 7), which TRL calls `apo_zero_unpaired`. The authors of KTO use z0 = 0 only to measure what
    their estimate adds.

    The loss is not a negative log-likelihood, but linear in probabilities: under a code, an answer is judged desirable
    with probability sigmoid(beta (r - z0)). A mixture of codes averages these probabilities, and so the losses. The
    label's log-likelihood is that of both judgements under one code,
    `log sigmoid(beta (r_w - z0)) + log sigmoid(beta (z0 - r_l))`. The two weights scale the
    judgements' losses and not their probabilities, so they are not part of it.

    Args:
        logps: Log-probabilities of the pairs under policy and reference.
        beta: Scale of the log-ratios, per nat. A larger beta saturates the loss earlier.
        desirable_weight: The paper's lambda_D.
        undesirable_weight: The paper's lambda_U.
        reference_point: z0, in nats.

    Raises:
        ValueError: A setting is out of range, the reference is missing, or pairs have margins.
    """
    check_beta(beta)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"{name}: found {weight}, expected a number above 0.")
    if not 0 <= reference_point < math.inf:
        raise ValueError(f"reference_point: found {reference_point}, expected a number of at least 0, as a KL is.")
    if logps.target_margins is not None:
        raise ValueError(
            "margins: found margins of pairs, expected none, because KTO judges each answer alone. Set "
            "data.columns.margin to null."
        )
    chosen, rejected = log_ratios(logps)
    desirable, undesirable = beta * (chosen - reference_point), beta * (reference_point - rejected)
    losses = (desirable_weight * (-desirable).sigmoid() + undesirable_weight * (-undesirable).sigmoid()) / 2
    log_likelihood = logsigmoid(desirable) + logsigmoid(undesirable)
    rewards = beta * chosen.detach(), beta * rejected.detach()
    parts = (
        LossTerm(logsigmoid(desirable), _misjudgement, desirable_weight / 2),
        LossTerm(logsigmoid(undesirable), _misjudgement, undesirable_weight / 2),
    )
    return PairLosses(losses, *rewards, log_likelihood, parts=parts)


def _misjudgement(log_probability: Tensor) -> Tensor:
    """Compute 1 - P from log P, the log-probability that an answer is judged as labelled."""
    return -torch.expm1(log_probability)


def orpo_loss(logps: PairLogps, beta: float = 0.1) -> PairLosses:
    """Compute the ORPO loss (Hong et al., 2024, arXiv 2403.07691, eq. 6).

    `-mean log pi(y_w) - beta log sigmoid(log odds(y_w) - log odds(y_l))` with odds = P / (1 - P). P is the geometric
    mean of the probabilities of an answer's tokens. The first term is SFT on the chosen answer, without the prompt,
    whose tokens TRL counts too.

    The label's log-likelihood is `log sigmoid(...)`, the Bradley-Terry probability odds(y_w) / (odds(y_w) + odds(y_l)).
    beta is its weight in the loss, and does not change the posterior over codes. The SFT term is mixed as in `add_nll`.
    A pair's margin is subtracted from the difference of log odds.

    Args:
        logps: Log-probabilities of the pairs. Those of the reference are ignored.
        beta: The paper's lambda, the weight of the odds ratio beside the SFT term.

    Raises:
        ValueError: `beta` is out of range.
    """
    check_beta(beta)
    chosen = logps.policy_chosen / logps.chosen_lengths
    rejected = logps.policy_rejected / logps.rejected_lengths
    logits = _log_odds(chosen) - _log_odds(rejected)
    log_likelihood = logsigmoid(logits if logps.target_margins is None else logits - logps.target_margins)
    rewards = beta * chosen.detach(), beta * rejected.detach()
    parts = (LossTerm(log_likelihood, weight=beta),)
    odds_ratio = PairLosses(-beta * log_likelihood, *rewards, log_likelihood, parts=parts)
    return add_nll(odds_ratio, logps, 1.0)


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
    per_token = partial(_nll_per_token, lengths=logps.chosen_lengths.flatten())
    text = LossTerm(logps.policy_chosen, per_token, weight, is_text=True)
    return replace(
        pairs,
        losses=pairs.losses - weight * logps.policy_chosen / logps.chosen_lengths,
        log_likelihood=pairs.label_log_likelihood,
        parts=(*pairs.terms, text),
        label_losses=pairs.losses if pairs.label_losses is None else pairs.label_losses,
    )


def _nll_per_token(log_likelihood: Tensor, lengths: Tensor) -> Tensor:
    """Divide the negative log-likelihoods (B,) or (B, K) of answers by their lengths (B,)."""
    return -log_likelihood / (lengths if log_likelihood.dim() == 1 else lengths[:, None])


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


def _log_odds(mean_logps: Tensor) -> Tensor:
    """Compute log (P / (1 - P)) from log P. Rounding makes P = 1 of certain answers, whose odds would be infinite."""
    mean_logps = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return mean_logps - (-torch.expm1(mean_logps)).log()


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
            "DPO, IPO and KTO compare the policy with a reference; SimPO and ORPO do not need one."
        )
    return logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected
