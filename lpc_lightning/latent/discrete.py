"""Discrete codebook with its prior, the part that all estimators share, and distributions over its codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from lpc_lightning.latent.networks import Codebook, Prior, check_codebook
from lpc_lightning.latent.space import InferenceForm, LatentSpace, PairScorer, PriorMode
from lpc_lightning.transfer import to_device
from lpc_lightning.types import LogitHead, PairStates

MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda log_prior: log_prior.exp(),
    "sample": lambda log_prior: one_hot(torch.multinomial(log_prior.exp(), 1)[:, 0], log_prior),
    "argmax": lambda log_prior: one_hot(log_prior.argmax(-1), log_prior),
}
"""Functions from the prior's log-probabilities (B, K) to weights over the codes (B, K), by prior mode."""
SUM_ELEMENTS = 2**24
"""Terms of sums over the earlier pairs of pairs that are in memory at a time: 64 MiB in float32."""


def one_hot(codes: Tensor, like: Tensor) -> Tensor:
    """Convert code numbers (B,) to one-hot weights (B, K), with K and the dtype of `like`."""
    return torch.nn.functional.one_hot(codes, like.shape[-1]).to(like.dtype)


class DiscreteSpace(LatentSpace):
    """Codebook E (K, d) with a prior over its codes. Subclasses define how the two are learned."""

    has_codes = True

    def __init__(
        self,
        num_codes: int = 32,
        init_logit_std: float = 0.1,
        prior_mode: PriorMode = "mean",
        diversity_weight: float = 0.0,
        **networks: Any,
    ) -> None:
        """Store the settings.

        Args:
            num_codes: K, the number of vectors in the codebook. The paper's results peak at 32 to 64.
            init_logit_std: Initial standard deviation of LMHead(e_k) over the vocabulary, in logits (nats). With 0,
                training starts at the plain algorithm, and only noise can separate the codes.
            prior_mode: How z is taken from the prior at inference: `mean`, `sample`, `argmax`, or a code's number.
            diversity_weight: Weight of the diversity loss of wav2vec 2.0 (arXiv 2006.11477, eq. 4): the entropy, in
                nats, that the prior's mean over a micro-batch lacks compared with even use of the codes. It keeps the
                prior from collapsing to few codes.
            networks: Settings of `LatentSpace`.

        Raises:
            ValueError: `num_codes` is below 1, `init_logit_std` or `diversity_weight` is negative or not finite, or
                `prior_mode` is unknown.
        """
        check_codebook(num_codes, init_logit_std)
        if not 0 <= diversity_weight < math.inf:
            raise ValueError(f"latent.diversity_weight: found {diversity_weight}, expected a number of at least 0.")
        super().__init__(**networks)
        self.diversity_weight = diversity_weight
        self.num_codes, self.init_logit_std, self.prior_mode = num_codes, init_logit_std, prior_mode
        self.code_weights(prior_mode, torch.zeros(1, num_codes))

    def build(self, width: int, head: LogitHead) -> None:
        """Create codebook and prior."""
        self.codebook = Codebook(self.num_codes, width, self.init_logit_std, head)
        self.prior = Prior(width, self.num_codes, self.networks)

    def settings_of_batch(self) -> list[str]:
        """See `LatentSpace.settings_of_batch`. The diversity loss is of the mean prior of a batch."""
        settings = super().settings_of_batch()
        return [*settings, "latent.diversity_weight"] if self.diversity_weight else settings

    @property
    def codes(self) -> Tensor:
        """The codebook (K, d)."""
        return self.codebook.weight

    def mix(self, weights: Tensor) -> Tensor:
        """Compute z = c E (B, d) from weights c (B, K)."""
        return self.codebook(weights)

    def log_prior(self, prompt: Tensor) -> Tensor:
        """Compute log p(k given x) (B, K) from prompt states (B, d)."""
        return self.prior(prompt).log_softmax(-1)

    def infer(self, prompt: Tensor, mode: PriorMode | None = None) -> Tensor:
        """Compute z = c E, where `mode` selects how the weights c (B, K) are taken from the prior."""
        return self.codebook(self.code_weights(self.prior_mode if mode is None else mode, self.log_prior(prompt)))

    def inference_form(self) -> InferenceForm:
        """Return codebook and prior."""
        return InferenceForm(
            kind="discrete",
            settings={"num_codes": self.num_codes, "prior_mode": self.prior_mode},
            tensors={"codebook": self.codes.detach(), **self.prior.weights("prior")},
        )

    def diversity_penalty(self, log_prior: Tensor) -> Tensor | float:
        """Compute `diversity_weight` (log K - H(mean p)) in nats, for each pair (B,).

        Args:
            log_prior: (B, K) log p_k of a micro-batch.
        """
        if not self.diversity_weight:
            return 0.0
        # From the logarithm: the gradient of x log x is NaN where the mean prior of a code is rounded to 0.
        log_mean = log_prior.logsumexp(0) - math.log(len(log_prior))
        missing_entropy = math.log(self.num_codes) + (log_mean.exp() * log_mean).sum()
        return (self.diversity_weight * missing_entropy).expand(len(log_prior))

    def imitation_loss(self, states: PairStates, codes: Tensor) -> Tensor:
        """Compute the cross-entropy (B,), in nats, of given `codes` (B,) under the networks' predictions."""
        return nll_loss(self.log_prior(states.prompt), codes, reduction="none")

    def posterior_z(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """Compute z = q E. Return None if the space has no posterior q."""
        log_posterior = self.log_posterior(states, score)
        return None if log_posterior is None else self.codebook(log_posterior.exp())

    def adaptation_values(
        self, states: PairStates, score: PairScorer, preference: PairScorer, opposite: PairScorer
    ) -> dict[str, Tensor]:
        """Compute the prior, and the log-likelihoods of the labels and of both preferences under each code."""
        return {
            "log_prior": self.log_prior(states.prompt),
            "evidence": score.under_codes(self.codes)[0].label_log_likelihood,
            "losses": -preference.under_codes(self.codes)[0].label_log_likelihood,
            "swapped": -opposite.under_codes(self.codes)[0].label_log_likelihood,
        }

    def label_log_likelihood(self, states: PairStates, score: PairScorer) -> Tensor:
        """Compute the exact evidence of the labels, given the annotator's earlier pairs if the space pools them."""
        likelihoods = score.under_codes(self.codes)[0].label_log_likelihood
        log_weights = self.updated_log_prior(self.log_prior(states.prompt), likelihoods, states)
        return (log_weights + likelihoods).logsumexp(-1)

    def log_joint(self, prompt: Tensor, score: PairScorer) -> Tensor:
        """Compute log p_k - l_k (B, K): the log of prior times label likelihood under code k, in nats."""
        return self.log_prior(prompt) + score.under_codes(self.codes)[0].label_log_likelihood

    def log_exact_posterior(self, states: PairStates, score: PairScorer) -> Tensor:
        """Compute the log of prior times label likelihood, normalized over the codes: (B, K)."""
        return self.log_joint(states.prompt, score).log_softmax(-1)

    def log_evidence(self, prompt: Tensor, score: PairScorer) -> Tensor:
        """Compute log sum_k p_k exp(-l_k) (B,) exactly, of each pair alone."""
        return self.log_joint(prompt, score).logsumexp(-1)

    def label_correct(self, prompt: Tensor, score: PairScorer) -> Tensor | None:
        """Compute the posterior that labels are correct (B,), with the code summed out."""
        pairs, _ = score.under_codes(self.codes)
        if pairs.label_correct is None:
            return None
        return (self.log_joint(prompt, score).softmax(-1) * pairs.label_correct).sum(-1)

    def code_weights(self, mode: PriorMode, log_prior: Tensor) -> Tensor:
        """Compute weights over the codes (B, K) from the prior's log-probabilities (B, K), by `mode`.

        Raises:
            ValueError: `mode` is neither a known name nor the number of a code.
        """
        if isinstance(mode, int) and 0 <= mode < self.num_codes:
            return one_hot(torch.full(log_prior.shape[:1], mode, device=log_prior.device), log_prior)
        if mode in MODES:
            return MODES[str(mode)](log_prior)
        raise ValueError(
            f"latent.prior_mode: found {mode!r}, expected one of {', '.join(MODES)}, "
            f"or the number of a code from 0 to {self.num_codes - 1}."
        )


def earlier_pairs(states: PairStates, device: torch.device) -> Tensor:
    """Return a (B, B) bool mask: True at (i, j) if pair j is evidence for pair i.

    It is if it precedes pair i, has the same annotator, and is no copy of pair i, whose label it would repeat. Pairs
    with the annotator "" have no earlier pairs.
    """
    rows = range(len(states.prompt))
    names_given = states.annotators or [""] * len(rows)
    annotators: list[str | int] = [name or row for row, name in zip(rows, names_given, strict=True)]
    contents: list[str | int] = list(states.contents or rows)
    names, texts = (to_device([keys.index(key) for key in keys], device, torch.long) for keys in (annotators, contents))
    return ((names[:, None] == names) & (texts[:, None] != texts)).tril(-1)


def _sum_over(earlier: Tensor, values: Tensor) -> Tensor:
    """Compute the sums (B, M) of `values` (B, M) over the earlier pairs (B, B) of each pair.

    Autocast and TF32 round matrix products, so this is a sum. It is taken for some of the pairs at a time: the held-out
    pairs of a warm start are one batch, whose B^2 M terms could take gigabytes.
    """
    rows = max(1, SUM_ELEMENTS // values.numel())
    return torch.cat([torch.where(part[:, :, None], values, 0.0).sum(1) for part in earlier.split(rows)])


def given_earlier_pairs(log_prior: Tensor, log_likelihoods: Tensor, states: PairStates) -> Tensor:
    """Compute log p(k given x_i and the earlier pairs j of the same annotator).

    The probability is p_k(x_i) prod_j exp(-l_jk), normalized over the codes. See `earlier_pairs` for the pairs j.

    Args:
        log_prior: (B, K) log p_k(x_i).
        log_likelihoods: (B, K) -l_ik, the log-likelihood of each label under each code
            (`PairLosses.label_log_likelihood`).
        states: The pairs, of which annotators and contents are used.

    Returns:
        (B, K). For a pair without earlier pairs this is exactly the prior. Gradient flows through the log-likelihoods
        as well.
    """
    if not any(states.annotators):
        return log_prior
    earlier = earlier_pairs(states, log_likelihoods.device)
    total = _sum_over(earlier, log_likelihoods)
    return torch.where(earlier.any(-1, keepdim=True), (log_prior + total).log_softmax(-1), log_prior)


def mean_of_earlier_pairs(values: Tensor, default: Tensor, states: PairStates) -> Tensor:
    """Compute the mean (B, M) of `values` (B, M) over the earlier pairs of each pair; see `earlier_pairs`.

    A pair without earlier pairs has its row of `default` (B, M). Values then have a gradient of 0, and not none, which
    DDP would refuse.
    """
    earlier = earlier_pairs(states, values.device)
    counts = earlier.sum(-1, keepdim=True)
    total = _sum_over(earlier, values)
    return torch.where(counts > 0, total / counts.clamp_min(1), default)


def categorical_kl(posterior: Tensor, prior: Tensor) -> Tensor:
    """Compute the KL between categorical distributions, sum_k q_k (log q_k - log p_k).

    Args:
        posterior: (B, K) log-probabilities log q.
        prior: (B, K) log-probabilities log p.

    Returns:
        (B,) in nats.
    """
    return (posterior.exp() * (posterior - prior)).sum(-1)
