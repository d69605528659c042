"""Control spaces: they enter the model as LPC does, with less or other structure.

The gains of LPC may come from extra parameters or from noise. Each control keeps one of these and drops the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax

from lpc_lightning.latent.discrete import MODES, DiscreteSpace, mean_of_earlier_pairs
from lpc_lightning.latent.estimators import GumbelSpace
from lpc_lightning.latent.networks import Codebook, Posterior, Prior, check_codebook, state_deviation
from lpc_lightning.latent.schedules import Schedule, WeightedKL, prior_share_schedule, temperature_schedule
from lpc_lightning.latent.space import InferenceForm, LatentSpace, LatentTerms, PairScorer, PriorMode
from lpc_lightning.types import LogitHead, PairStates


class PriorOnlySpace(DiscreteSpace):
    """Codebook and prior without a posterior: Gumbel samples from the prior, without KL."""

    def __init__(self, tau: float | Schedule = 1.0, hard: bool = False, **space: Any) -> None:
        """Store the settings.

        Args:
            tau: Temperature of the Gumbel-softmax, above zero. A number or a schedule such as `Exponential`.
            hard: Straight-through estimator: one code in the forward pass, the soft mixture's gradient in the backward
                pass.
            space: Settings of `DiscreteSpace`.

        Raises:
            ValueError: `tau` is not above zero at the first or the last step.
        """
        super().__init__(**space)
        self.tau, self.hard = temperature_schedule(tau), hard

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the losses under one z for each pair, sampled from its prior."""
        prior, tau = self.log_prior(states.prompt), self.tau(progress)
        z = self.codebook(gumbel_softmax(prior, tau, hard=self.hard))
        penalty = self.diversity_penalty(prior)
        return LatentTerms(*score.under(z), penalty=penalty, z=z, prior=prior, settings={"tau": tau})


class PosteriorOnlySpace(GumbelSpace):
    """Control that always trains the policy under the posterior (g = 0). The prior learns from the KL alone."""

    def __init__(self, **space: Any) -> None:
        """Store the settings.

        Args:
            space: Settings of `GumbelSpace`, except g.
        """
        super().__init__(g=0.0, **space)


class DeterministicSpace(LatentSpace):
    """Space whose z is a deterministic function of the prompt, or a constant. It has no distribution and no KL.

    Every prior mode gives the same z.
    """

    @abstractmethod
    def z(self, prompt: Tensor) -> Tensor:
        """Compute z (B, d) from the states at the last prompt tokens (B, d)."""

    def infer(self, prompt: Tensor, mode: PriorMode | None = None) -> Tensor:
        """Compute z, which is the same for every mode.

        Raises:
            ValueError: `mode` is the number of a code, or unknown.
        """
        if mode is not None and mode not in MODES:
            raise ValueError(
                f"latent.prior_mode: found {mode!r}, expected one of {', '.join(MODES)} (the same here): this latent "
                "has no codes."
            )
        return self.z(prompt)

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the losses of the pairs under their z."""
        z = self.z(states.prompt)
        return LatentTerms(*score.under(z), z=z)


class VectorSpace(DeterministicSpace):
    """One learned vector for all prompts. It acts as a bias on the logits."""

    def __init__(self, init_logit_std: float = 0.0) -> None:
        """Store the settings.

        Args:
            init_logit_std: Initial standard deviation of LMHead(z) over the vocabulary, in logits (nats). With 0,
                training starts at the plain policy.

        Raises:
            ValueError: `init_logit_std` is negative or not finite.
        """
        check_codebook(1, init_logit_std)
        super().__init__()
        self.init_logit_std = init_logit_std

    def build(self, width: int, head: LogitHead) -> None:
        """Create the vector."""
        scale = self.init_logit_std / state_deviation(head) if self.init_logit_std else 0.0
        self.vector = nn.Parameter(scale * torch.randn(width))

    def z(self, prompt: Tensor) -> Tensor:
        """Return the vector, once for each prompt: (B, d)."""
        return self.vector.expand(prompt.shape[0], -1)

    def inference_form(self) -> InferenceForm:
        """Return the vector."""
        return InferenceForm("vector", {"prior_mode": "mean"}, {"vector": self.vector.detach()})


class MLPSpace(DeterministicSpace):
    """Space with z = MLP(h_x): z depends on the prompt, without a codebook. It starts at z = 0, the plain policy."""

    def build(self, width: int, head: LogitHead) -> None:
        """Create the network. Its last layer starts at zero."""
        self.network = Prior(width, width, self.networks)

    def z(self, prompt: Tensor) -> Tensor:
        """Compute MLP(h_x): (B, d)."""
        return self.network(prompt)

    def inference_form(self) -> InferenceForm:
        """Return the network."""
        return InferenceForm("mlp", {"prior_mode": "mean"}, self.network.weights("network"))


class GaussianSpace(LatentSpace):
    """Codebook with continuous weights: z = c E, with c ~ Normal(mean, std) from prior or posterior.

    The codebook, the KL and the mixture by g are those of the paper. Only the weights c are not a distribution over
    codes.

    With `annotators` and g = 0, it is trained as it adapts: a pair is scored under the posterior of its annotator's
    earlier pairs in the batch. VPL (arXiv 2408.10075) trains such a posterior of the pairs of one person, and combines
    them by attention. Here mean and log deviation are the means over the pairs.
    """

    def __init__(
        self,
        num_codes: int = 32,
        init_logit_std: float = 0.1,
        kl_weight: float | Schedule = 0.05,
        free_bits: float = 0.0,
        g: float | Schedule | None = None,
        prior_mode: Literal["mean", "sample"] = "mean",
        annotators: bool = False,
        **networks: Any,
    ) -> None:
        """Store the settings.

        Args:
            num_codes: K, the number of vectors in the codebook and of dimensions of the Gaussian.
            init_logit_std: Initial standard deviation of LMHead(e_k) over the vocabulary, in logits (nats).
            kl_weight: lambda, the weight of the KL between posterior and prior. A number or a schedule.
            free_bits: KL in nats below which the penalty of a pair is constant.
            g: Share of the prior in the training mixture. A number or a schedule; null is the line from 0 to 1.
            prior_mode: How z is taken from the prior at inference: its `mean`, or a `sample`.
            annotators: Score each pair under the posterior of the earlier pairs of its annotator in the batch, without
                its own label. Under the prior if there are none. Needs an annotator column, and batches with several
                pairs of an annotator (data.batch_order: ByAnnotator).
            networks: Settings of `LatentSpace`.

        Raises:
            ValueError: `num_codes` is below 1, `init_logit_std`, `kl_weight` or `free_bits` is negative, `g` is no
                share, or `prior_mode` is unknown.
        """
        check_codebook(num_codes, init_logit_std)
        super().__init__(**networks)
        self.num_codes, self.init_logit_std, self.prior_mode = num_codes, init_logit_std, prior_mode
        self.divergence = WeightedKL(kl_weight, free_bits)
        self.g, self.annotators = prior_share_schedule(g), annotators
        self._weights(prior_mode, *torch.zeros(2, 1, num_codes))

    def build(self, width: int, head: LogitHead) -> None:
        """Create codebook, prior and posterior."""
        self.codebook = Codebook(self.num_codes, width, self.init_logit_std, head)
        self.prior = Prior(width, 2 * self.num_codes, self.networks)
        self.posterior = Posterior(width, 2 * self.num_codes, self.networks)

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the losses under one reparametrized z for each pair, and lambda KL."""
        prior, posterior = self.prior(states.prompt), self.posterior.logits(states)
        if self.annotators:
            posterior = mean_of_earlier_pairs(posterior, prior, states)
        (prior_mean, prior_log_std), (posterior_mean, posterior_log_std) = prior.chunk(2, -1), posterior.chunk(2, -1)
        g = self.g(progress)
        weights = (1 - g) * _draw(posterior_mean, posterior_log_std) + g * _draw(prior_mean, prior_log_std)
        kl = gaussian_kl(posterior_mean, posterior_log_std, prior_mean, prior_log_std)
        z = self.codebook(weights)
        weighted = self.divergence(kl, progress)
        return LatentTerms(*score.under(z), penalty=weighted, z=z, kl=kl, weighted_kl=weighted, settings={"g": g})

    def mix(self, weights: Tensor) -> Tensor:
        """Compute z = c E (B, d) from weights c (B, K)."""
        return self.codebook(weights)

    def adaptation_values(
        self, states: PairStates, score: PairScorer, preference: PairScorer, opposite: PairScorer
    ) -> dict[str, Tensor]:
        """Compute the means of the weights c under prior and posterior."""
        return {"prior_mean": self.prior_mean(states.prompt), "posterior_mean": self.posterior_mean(states)}

    def posterior_z(self, states: PairStates, score: PairScorer) -> Tensor:
        """Compute z = c E, where c is the posterior's mean."""
        return self.codebook(self.posterior_mean(states))

    def posterior_mean(self, states: PairStates) -> Tensor:
        """Compute the mean (B, K) of the weights c given the labelled pairs."""
        mean, _ = self.posterior.logits(states).chunk(2, dim=-1)
        return mean

    def prior_mean(self, prompt: Tensor) -> Tensor:
        """Compute the mean (B, K) of the weights c given the prompts."""
        mean, _ = self.prior(prompt).chunk(2, dim=-1)
        return mean

    def infer(self, prompt: Tensor, mode: PriorMode | None = None) -> Tensor:
        """Compute z = c E, where c is the prior's mean or a sample.

        Raises:
            ValueError: `mode` is neither `mean` nor `sample`.
        """
        mean, log_std = self.prior(prompt).chunk(2, dim=-1)
        return self.codebook(self._weights(self.prior_mode if mode is None else mode, mean, log_std))

    def _weights(self, mode: PriorMode, mean: Tensor, log_std: Tensor) -> Tensor:
        """Return the weights c (B, K)."""
        match mode:
            case "mean":
                return mean
            case "sample":
                return _draw(mean, log_std)
            case other:
                raise ValueError(
                    f"latent.prior_mode: found {other!r}, expected mean or sample: a Gaussian latent has no codes."
                )

    def inference_form(self) -> InferenceForm:
        """Return codebook and prior."""
        return InferenceForm(
            kind="gaussian",
            settings={"num_codes": self.num_codes, "prior_mode": self.prior_mode},
            tensors={"codebook": self.codebook.weight.detach(), **self.prior.weights("prior")},
        )


def _draw(mean: Tensor, log_std: Tensor) -> Tensor:
    return mean + log_std.exp() * torch.randn_like(mean)


def gaussian_kl(mean_q: Tensor, log_std_q: Tensor, mean_p: Tensor, log_std_p: Tensor) -> Tensor:
    """Compute the KL between normal distributions with diagonal covariance. Each argument is (B, M).

    Returns:
        (B,) in nats.
    """
    ratio = (2 * (log_std_q - log_std_p)).exp()
    shift = ((mean_q - mean_p) / log_std_p.exp()).square()
    return 0.5 * (ratio + shift - 1 - 2 * (log_std_q - log_std_p)).sum(-1)
