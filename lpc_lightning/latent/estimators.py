"""Three estimators for a discrete space: sampled (the paper's), expected, and exact.

In the formulas, l_k is the algorithm's loss of a pair under code k, p is the prior and q is the posterior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, gumbel_softmax

from lpc_lightning.latent.discrete import DiscreteSpace, categorical_kl, given_earlier_pairs
from lpc_lightning.latent.networks import Posterior, PosteriorReads
from lpc_lightning.latent.schedules import Schedule, WeightedKL, prior_share_schedule, temperature_schedule
from lpc_lightning.latent.space import LatentTerms, PairScorer
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates


class PosteriorSpace(DiscreteSpace):
    """Discrete space with a learned posterior. The term lambda KL keeps the posterior close to the prior."""

    def __init__(
        self,
        kl_weight: float | Schedule = 0.05,
        free_bits: float = 0.0,
        posterior_reads: PosteriorReads = "both",
        **space: Any,
    ) -> None:
        """Store the settings.

        Args:
            kl_weight: lambda, the weight of the KL between posterior and prior. A number or a schedule (`WarmUp`). The
                paper tries 0.01, 0.05 and 0.1, and uses 0.05.
            free_bits: KL in nats below which the penalty of a pair is constant.
            posterior_reads: Input of the posterior: `both` answers' states concatenated, as in the paper; their
                `difference` h_w - h_l; or their `sum`, which does not depend on the label, so that no label can leak.
            space: Settings of `DiscreteSpace`.

        Raises:
            ValueError: `kl_weight` or `free_bits` is negative.
        """
        super().__init__(**space)
        self.divergence, self.posterior_reads = WeightedKL(kl_weight, free_bits), posterior_reads

    def build(self, width: int, head: LogitHead) -> None:
        """Create codebook, prior and posterior."""
        super().build(width, head)
        self.posterior = Posterior(width, self.num_codes, self.networks, self.posterior_reads)

    def log_posterior(self, states: PairStates, score: PairScorer) -> Tensor:
        """Compute log q(k given x, y_w over y_l) (B, K) with the posterior network. `score` is not used."""
        return self.posterior.logits(states).log_softmax(-1)

    def adaptation_values(
        self, states: PairStates, score: PairScorer, preference: PairScorer, opposite: PairScorer
    ) -> dict[str, Tensor]:
        """Compute the values of `DiscreteSpace`, and the learned posterior."""
        posterior = self.log_posterior(states, score)
        return super().adaptation_values(states, score, preference, opposite) | {"log_posterior": posterior}

    def imitation_loss(self, states: PairStates, codes: Tensor) -> Tensor:
        """Compute the sum of the cross-entropies of prior and posterior: (B,), in nats."""
        posterior_loss = cross_entropy(self.posterior.logits(states), codes, reduction="none")
        return super().imitation_loss(states, codes) + posterior_loss


class GumbelSpace(PosteriorSpace):
    """The paper's estimator: the policy is scored under a Gumbel-softmax mixture of the codes.

    c = GumbelSoftmax(a, tau) for prior and posterior, z = (1 - g) c_q E + g c_p E (Gong et al., 2025, section 3).
    """

    def __init__(
        self, tau: float | Schedule = 1.0, hard: bool = False, g: float | Schedule | None = None, **space: Any
    ) -> None:
        """Store the settings.

        Args:
            tau: Temperature of the Gumbel-softmax, above zero. A number or a schedule such as `Exponential`.
            hard: Straight-through estimator: one code in the forward pass, the soft mixture's gradient in the backward
                pass.
            g: Share of the prior in the training mixture. A number or a schedule; null is the paper's line from 0 to 1.
            space: Settings of `PosteriorSpace`.

        Raises:
            ValueError: `tau` is not above zero, or `g` is no share, at the first or the last step.
        """
        super().__init__(**space)
        self.tau, self.hard = temperature_schedule(tau), hard
        self.g = prior_share_schedule(g)

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the losses under one sampled z for each pair, and lambda KL."""
        prior, posterior = self.log_prior(states.prompt), self.log_posterior(states, score)
        tau, g = self.tau(progress), self.g(progress)
        from_prior = gumbel_softmax(prior, tau, hard=self.hard)
        from_posterior = gumbel_softmax(posterior, tau, hard=self.hard)
        z = self.codebook((1 - g) * from_posterior + g * from_prior)
        kl = categorical_kl(posterior, prior)
        weighted_kl = self.divergence(kl, progress)
        return LatentTerms(
            *score.under(z),
            penalty=weighted_kl + self.diversity_penalty(prior),
            weighted_kl=weighted_kl,
            z=z,
            kl=kl,
            prior=prior,
            posterior=posterior,
            settings={"g": g, "tau": tau},
        )


class ExpectedSpace(PosteriorSpace):
    """The paper's bound without sampling noise: sum_k q_k l_k + lambda KL, where q is the learned posterior.

    For RE-PO, l_k is the negative log-likelihood of the label, of which the published loss has the gradient alone.
    """

    scores_codes = True

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the losses under all codes, averaged with the posterior's weights, and lambda KL."""
        prior, posterior = self.log_prior(states.prompt), self.log_posterior(states, score)
        pairs, logps = score.under_codes(self.codes)
        kl = categorical_kl(posterior, prior)
        weighted_kl = self.divergence(kl, progress)
        return LatentTerms(
            *average_over_codes(
                pairs, logps, posterior, lambda each: (posterior.exp() * each.objective).sum(-1), posterior
            ),
            penalty=weighted_kl + self.diversity_penalty(prior),
            weighted_kl=weighted_kl,
            z=self.codebook(posterior.exp()).detach(),
            kl=kl,
            prior=prior,
            posterior=posterior,
        )


class MarginalSpace(DiscreteSpace):
    """The exact marginal over codes: -log sum_k p_k exp(-l_k).

    For DPO and SimPO this is -log sum_k p_k sigmoid(beta D_k), the negative log marginal likelihood of the label. The
    paper's objective is a bound on it. The posterior is exact: q_k is proportional to p_k exp(-l_k). There is no
    posterior network and no Gumbel noise, and no label can leak.

    Some losses are not log-likelihoods. For IPO the loss is the soft minimum over codes
    -1/s log sum_k p_k exp(-s l_k), where s converts the loss to nats (see `ipo_loss`). For rDPO the unbiased sum is
    taken over the marginals of the label and of its opposite (see `unbiased_losses`). KTO's loss is 1 - P, and the
    marginal replaces P of each answer by sum_k p_k P_k (see `kto_loss`). ORPO's two terms are marginals of their own
    (see `orpo_loss`).

    A pair's margin m is part of the likelihood: for DPO, the label has the probability sigmoid(beta D_k - m) under code
    k. With m above 0, the probabilities of the two labels add up to less than 1. So a label with a large margin favours
    the codes under which its answer is better by about m. A pair's weight multiplies its loss alone. The posterior q
    and the evidence that pairs share do not depend on weights.

    With `annotators`, p_k is the prior updated with the annotator's earlier pairs in the batch, except copies of the
    pair. Without copies, the losses of an annotator's pairs add up to the marginal of all their labels together. This
    marginal contains information that single pairs do not have. If half of the annotators prefer the opposite of the
    other half, one code for each half makes a single label no more likely than no code at all (see
    docs/latent_spaces.md).
    """

    scores_codes = True

    def __init__(self, annotators: bool = False, **space: Any) -> None:
        """Store the settings.

        Args:
            annotators: Score each pair given the earlier pairs of its annotator in the batch, as `adapt` does. Needs
                an annotator column, and batches with several pairs of an annotator (data.batch_order: ByAnnotator).
                Batches of other devices, and other batches accumulated for the same step, are not used.
            space: Settings of `DiscreteSpace`.
        """
        super().__init__(**space)
        self.annotators = annotators

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the exact loss. Rewards and log-probabilities are reported under the prior, the KL against p_k."""
        prior = self.log_prior(states.prompt)
        pairs, logps = score.under_codes(self.codes)
        log_likelihoods = pairs.label_log_likelihood
        updated_prior = self.updated_log_prior(prior, log_likelihoods, states)
        posterior = (updated_prior + log_likelihoods).log_softmax(-1).detach()
        return LatentTerms(
            *average_over_codes(pairs, logps, prior, lambda each: each.of_mixture(updated_prior), posterior),
            penalty=self.diversity_penalty(prior),
            z=self.codebook(prior.exp()).detach(),
            kl=categorical_kl(posterior, updated_prior.detach()),
            prior=prior,
            posterior=posterior,
        )

    def updated_log_prior(self, log_prior: Tensor, log_likelihoods: Tensor, states: PairStates) -> Tensor:
        """Return the prior, updated with the annotator's earlier pairs if `annotators` is set."""
        return given_earlier_pairs(log_prior, log_likelihoods, states) if self.annotators else log_prior

    def log_posterior(self, states: PairStates, score: PairScorer) -> Tensor:
        """Compute the exact posterior: q_k proportional to p_k exp(-l_k)."""
        return self.log_exact_posterior(states, score)


def average_over_codes(
    pairs: PairLosses,
    logps: PairLogps,
    log_weights: Tensor,
    losses: Callable[[PairLosses], Tensor],
    log_posterior: Tensor,
) -> tuple[PairLosses, PairLogps]:
    """Average rewards and log-probabilities (B, K) over the codes, without gradient, and compute the step's losses.

    Args:
        pairs: Losses and rewards under each code.
        logps: Log-probabilities under each code.
        log_weights: (B, K) log-weights of the codes.
        losses: Computes the losses (B,) of the step from those under each code.
        log_posterior: (B, K) log-posterior of the codes given the labels. It averages the posterior that a label is
            correct.
    """
    weights = log_weights.detach().exp()

    def mean(values: Tensor) -> Tensor:
        return (weights * values.detach()).sum(-1)

    correct = pairs.label_correct
    correct = None if correct is None else (log_posterior.detach().exp() * correct).sum(-1)
    return (
        PairLosses(
            losses(pairs),
            mean(pairs.chosen_rewards),
            mean(pairs.rejected_rewards),
            label_correct=correct,
            label_losses=None if pairs.label_losses is None else losses(pairs.label_part),
        ),
        replace(logps, policy_chosen=mean(logps.policy_chosen), policy_rejected=mean(logps.policy_rejected)),
    )
