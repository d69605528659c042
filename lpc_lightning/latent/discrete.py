"""The discrete codebook with its prior: the part that all estimators share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from lpc_lightning.latent.networks import Codebook, Prior, check_codebook
from lpc_lightning.latent.space import InferenceForm, LatentSpace, PairScorer, PriorMode
from lpc_lightning.types import LogitHead, PairStates

MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda log_prior: log_prior.exp(),
    "sample": lambda log_prior: one_hot(torch.multinomial(log_prior.exp(), 1)[:, 0], log_prior),
    "argmax": lambda log_prior: one_hot(log_prior.argmax(-1), log_prior),
}
"""Weights over the codes (B, K) from the prior's log-probabilities (B, K)."""


def one_hot(codes: Tensor, like: Tensor) -> Tensor:
    """(B,) code numbers to (B, K) weights, with K and the type of `like`."""
    return torch.nn.functional.one_hot(codes, like.shape[-1]).to(like.dtype)


class DiscreteSpace(LatentSpace):
    """A codebook E (K, d) and a prior over it. Subclasses say how the two are learned."""

    annotators: bool = False
    """Pairs of one annotator share what they say about the codes."""
    scores_codes: bool = False
    """True if training scores every pair under every code."""

    def __init__(
        self,
        num_codes: int = 32,
        init_logit_std: float = 0.1,
        prior_mode: PriorMode = "mean",
        diversity_weight: float = 0.0,
        **networks: Any,
    ) -> None:
        """Keep the settings.

        Args:
            num_codes: K, vectors in the codebook. The paper's results peak at 32 to 64.
            init_logit_std: Initial deviation of LMHead(e_k) over the vocabulary, in logits (nats). 0 starts at the
                plain algorithm, with codes that only noise can part.
            prior_mode: How z is taken from the prior at inference: `mean`, `sample`, `argmax`, or a code's number.
            diversity_weight: What it costs, a nat, that the prior's mean over a micro-batch falls short of an even
                use of the codes (the diversity loss of wav2vec 2.0, arXiv 2006.11477, eq. 4). Against a prior that
                collapses to few codes.
            networks: Settings of `LatentSpace`.

        Raises:
            ValueError: `num_codes` is below 1, `init_logit_std` or `diversity_weight` is negative, or `prior_mode`
                names no code.
        """
        check_codebook(num_codes, init_logit_std)
        if diversity_weight < 0:
            raise ValueError(f"latent.diversity_weight: found {diversity_weight}, expected at least 0.")
        super().__init__(**networks)
        self.diversity_weight = diversity_weight
        self.num_codes, self.init_logit_std, self.prior_mode = num_codes, init_logit_std, prior_mode
        self.weights_by(prior_mode, torch.zeros(1, num_codes))

    def build(self, width: int, head: LogitHead) -> None:
        """Make codebook and prior."""
        self.codebook = Codebook(self.num_codes, width, self.init_logit_std, head)
        self.prior = Prior(width, self.num_codes, self.networks)

    def log_prior(self, prompt: Tensor) -> Tensor:
        """log p(k given x): (B, d) prompt states to (B, K)."""
        return self.prior(prompt).log_softmax(-1)

    def infer(self, prompt: Tensor, mode: PriorMode | None = None) -> Tensor:
        """z = c E, the weights c (B, K) taken from the prior by `mode`."""
        return self.codebook(self.weights_by(self.prior_mode if mode is None else mode, self.log_prior(prompt)))

    def inference_form(self) -> InferenceForm:
        """Codebook and prior."""
        return InferenceForm(
            kind="discrete",
            settings={"num_codes": self.num_codes, "prior_mode": self.prior_mode},
            tensors={"codebook": self.codebook.weight.detach(), **self.prior.weights("prior")},
        )

    def unevenness(self, log_prior: Tensor) -> Tensor | float:
        """(B, K) log p_k of a micro-batch to `diversity_weight` (log K - H(mean p)), in nats, for each pair (B,)."""
        if not self.diversity_weight:
            return 0.0
        use = log_prior.exp().mean(0)
        short = math.log(self.num_codes) + torch.xlogy(use, use).sum()
        return (self.diversity_weight * short).expand(len(log_prior))

    def imitation_loss(self, states: PairStates, codes: Tensor) -> Tensor:
        """(B,) nats that the networks are from saying `codes` (B,) of these pairs."""
        return nll_loss(self.log_prior(states.prompt), codes, reduction="none")

    def posterior_z(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """z = q E, where the space has a posterior q."""
        log_posterior = self.log_posterior(states, score)
        return None if log_posterior is None else self.codebook(log_posterior.exp())

    def log_joint(self, prompt: Tensor, score: PairScorer) -> Tensor:
        """(B, K) log p_k - l_k, with p the prior and l_k the pair's loss under code k, in nats of evidence."""
        return self.log_prior(prompt) + score.under_codes(self.codebook.weight)[0].label_log_likelihood

    def log_exact_posterior(self, states: PairStates, score: PairScorer) -> Tensor:
        """(B, K) prior times evidence, normalised."""
        return self.log_joint(states.prompt, score).log_softmax(-1)

    def log_evidence(self, prompt: Tensor, score: PairScorer) -> Tensor:
        """(B,) log sum_k p_k exp(-l_k), exact."""
        return self.log_joint(prompt, score).logsumexp(-1)

    def weights_by(self, mode: PriorMode, log_prior: Tensor) -> Tensor:
        """Weights over the codes (B, K) that `mode` takes from the prior's log-probabilities (B, K).

        Raises:
            ValueError: `mode` is no known name, or the number of no code.
        """
        if isinstance(mode, int) and 0 <= mode < self.num_codes:
            return one_hot(torch.full(log_prior.shape[:1], mode, device=log_prior.device), log_prior)
        if mode in MODES:
            return MODES[str(mode)](log_prior)
        raise ValueError(
            f"latent.prior_mode: found {mode!r}, expected one of {', '.join(MODES)}, "
            f"or the number of a code from 0 to {self.num_codes - 1}."
        )
