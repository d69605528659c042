"""Three ways to learn a discrete space: sampled (the paper's), expected, and exact.

In the formulas l_k is the algorithm's loss of a pair under code k, p the prior and q the posterior.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy, gumbel_softmax

from lpc_lightning.latent.discrete import DiscreteSpace
from lpc_lightning.latent.divergence import WeightedKL, categorical_kl
from lpc_lightning.latent.evidence import given_earlier_pairs
from lpc_lightning.latent.networks import Posterior, PosteriorReads
from lpc_lightning.latent.schedules import Linear, Schedule, as_schedule
from lpc_lightning.latent.space import LatentTerms, PairScorer
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates


class PosteriorSpace(DiscreteSpace):
    """A discrete space with a learned posterior, tied to the prior by lambda KL."""

    def __init__(
        self,
        kl_weight: float | Schedule = 0.1,
        free_bits: float = 0.0,
        posterior_reads: PosteriorReads = "both",
        **space: Any,
    ) -> None:
        """Keep the settings.

        Args:
            kl_weight: lambda, the weight of the KL between posterior and prior. A number, or a schedule (`WarmUp`).
            free_bits: KL in nats below which a pair pays no more for less.
            posterior_reads: What the posterior is shown: `both` answers' states side by side, as in the paper; their
                `difference` h_w - h_l; or their `sum`, which is the same whichever won, so that no label can leak.
            space: Settings of `DiscreteSpace`.
        """
        super().__init__(**space)
        self.divergence, self.posterior_reads = WeightedKL(kl_weight, free_bits), posterior_reads

    def build(self, width: int, head: LogitHead) -> None:
        """Make codebook, prior and posterior."""
        super().build(width, head)
        self.posterior = Posterior(width, self.num_codes, self.networks, self.posterior_reads)

    def log_posterior(self, states: PairStates, score: PairScorer) -> Tensor:
        """log q(k given x, y_w over y_l): (B, K), as the network says; `score` is not asked."""
        return self.posterior.of(states).log_softmax(-1)

    def imitation_loss(self, states: PairStates, codes: Tensor) -> Tensor:
        """Of prior and posterior, added."""
        of_posterior = cross_entropy(self.posterior.of(states), codes, reduction="none")
        return super().imitation_loss(states, codes) + of_posterior


class GumbelSpace(PosteriorSpace):
    """The paper's estimator: the policy answers under a Gumbel-softmax mixture of the codes.

    c = GumbelSoftmax(a, tau) for prior and posterior, z = (1 - g) c_q E + g c_p E (Gong et al., 2025, section 3).
    """

    def __init__(
        self, tau: float | Schedule = 1.0, hard: bool = False, g: float | Schedule | None = None, **space: Any
    ) -> None:
        """Keep the settings.

        Args:
            tau: Temperature of the Gumbel-softmax, above zero. A number or a schedule such as `Exponential`.
            hard: Straight-through: one code forward, the soft mixture's gradient backward.
            g: Share of the prior in the training mixture. A number or a schedule; null: the paper's line from 0 to 1.
            space: Settings of `PosteriorSpace`.
        """
        super().__init__(**space)
        self.tau, self.hard = as_schedule(tau), hard
        self.g = as_schedule(Linear() if g is None else g)

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """One sampled z for each pair, and lambda KL."""
        prior, posterior = self.log_prior(states.prompt), self.log_posterior(states, score)
        tau, g = self.tau(progress), self.g(progress)
        from_prior = gumbel_softmax(prior, tau, hard=self.hard)
        from_posterior = gumbel_softmax(posterior, tau, hard=self.hard)
        z = self.codebook((1 - g) * from_posterior + g * from_prior)
        kl = categorical_kl(posterior, prior)
        return LatentTerms(
            *score.under(z),
            penalty=self.divergence(kl, progress) + self.unevenness(prior),
            z=z,
            kl=kl,
            prior=prior,
            posterior=posterior,
            settings={"g": g, "tau": tau},
        )


class ExpectedSpace(PosteriorSpace):
    """The paper's bound without sampling noise: sum_k q_k l_k + lambda KL, q the learned posterior."""

    scores_codes = True

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """The loss under every code, weighed by the posterior, and lambda KL."""
        prior, posterior = self.log_prior(states.prompt), self.log_posterior(states, score)
        pairs, logps = score.under_codes(self.codebook.weight)
        losses = (posterior.exp() * pairs.losses).sum(-1)
        kl = categorical_kl(posterior, prior)
        return LatentTerms(
            *averaged(pairs, logps, posterior, losses),
            penalty=self.divergence(kl, progress) + self.unevenness(prior),
            z=self.codebook(posterior.exp()).detach(),
            kl=kl,
            prior=prior,
            posterior=posterior,
        )


class MarginalSpace(DiscreteSpace):
    """The exact marginal over codes: -log sum_k p_k exp(-l_k).

    For DPO and SimPO this is -log sum_k p_k sigmoid(beta D_k), the marginal likelihood of the label, of which the
    paper's objective is a lower bound; the posterior is exact, q_k proportional to p_k exp(-l_k). No posterior network,
    no Gumbel noise, and no label can leak. Two losses are no log-likelihoods. For IPO it is the soft minimum over codes
    -1/s log sum_k p_k exp(-s l_k), with s what makes nats of the loss (`ipo_loss`); for rDPO its unbiased sum is taken
    of the marginals of the label and of its opposite (`dpo_loss`).

    With `annotators`, p_k is what the annotator's earlier pairs in the batch leave of the prior. The losses of an
    annotator's pairs then add up to the marginal of all their labels together, which can find what single pairs cannot:
    where half of the annotators want the opposite of the other half, each label is as likely under a code for each half
    as under none (see docs/latent_spaces.md).
    """

    scores_codes = True

    def __init__(self, annotators: bool = False, **space: Any) -> None:
        """Keep the settings.

        Args:
            annotators: Have the pairs of one annotator in a batch share what they say about the codes: each is scored
                given the ones before it, as few-shot annotators are. Needs an annotator column, and batches that hold
                several pairs of an annotator (data.pairs_per_annotator); batches of other devices, and those that are
                accumulated for a step, share nothing.
            space: Settings of `DiscreteSpace`.
        """
        super().__init__(**space)
        self.annotators = annotators

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """The exact loss; rewards and log-probabilities are reported under the prior, the posterior against p_k."""
        prior = self.log_prior(states.prompt)
        pairs, logps = score.under_codes(self.codebook.weight)
        given = given_earlier_pairs(prior, pairs.label_log_likelihood, states.annotators) if self.annotators else prior
        posterior = (given + pairs.label_log_likelihood).log_softmax(-1).detach()
        return LatentTerms(
            *averaged(pairs, logps, prior, pairs.of_mixture(given)),
            penalty=self.unevenness(prior),
            z=self.codebook(prior.exp()).detach(),
            kl=categorical_kl(posterior, given.detach()),
            prior=prior,
            posterior=posterior,
        )

    def log_posterior(self, states: PairStates, score: PairScorer) -> Tensor:
        """The exact posterior: q_k proportional to p_k exp(-l_k)."""
        return self.log_exact_posterior(states, score)


def averaged(pairs: PairLosses, logps: PairLogps, log_weights: Tensor, losses: Tensor) -> tuple[PairLosses, PairLogps]:
    """Rewards and log-probabilities (B, K) as expectations over the codes (B,), next to the step's own `losses`."""
    weights = log_weights.detach().exp()

    def mean(values: Tensor) -> Tensor:
        return (weights * values.detach()).sum(-1)

    return (
        PairLosses(losses, mean(pairs.chosen_rewards), mean(pairs.rejected_rewards)),
        replace(logps, policy_chosen=mean(logps.policy_chosen), policy_rejected=mean(logps.policy_rejected)),
    )
