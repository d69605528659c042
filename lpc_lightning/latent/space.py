"""Base class of latent spaces: parameters, the training loss, and a z inferred from the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from lpc_lightning.latent.networks import NetworkSettings, RunningMoments, at_least_float32
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates

PriorMode = Literal["mean", "sample", "argmax"] | int
"""How z is taken from the prior at inference: its mean (sum_k p_k e_k), a sample, the likeliest code, or code k."""


class PairScorer(Protocol):
    """The algorithm's loss as a function of the latent. A latent space uses the policy only through this interface."""

    def under(self, z: Tensor | None) -> tuple[PairLosses, PairLogps]:
        """Compute losses and log-probabilities, (B,) each, with each pair's z (B, d) added before the head."""
        ...

    def under_codes(self, codes: Tensor) -> tuple[PairLosses, PairLogps]:
        """Compute losses and log-probabilities, (B, K) each, under every code of a codebook (K, d)."""
        ...


@dataclass(frozen=True, slots=True)
class LatentTerms:
    """Result of a step for each pair."""

    pairs: PairLosses
    """(B,) preference losses with gradient, and rewards. If the loss averages over codes, so do the rewards."""
    logps: PairLogps
    """(B,) log-probabilities, averaged like the rewards."""
    penalty: Tensor | float = 0.0
    """(B,) penalty of the latent, to be added to the losses (lambda KL and the diversity penalty), with gradient."""
    z: Tensor | None = None
    """(B, d) preference representation under which the pairs were scored."""
    kl: Tensor | None = None
    """(B,) KL from prior to posterior before weighting, in nats."""
    weighted_kl: Tensor | None = None
    """(B,) part of the penalty that comes from the KL (lambda KL)."""
    prior: Tensor | None = None
    """(B, K) prior log-probabilities of the codes."""
    posterior: Tensor | None = None
    """(B, K) posterior log-probabilities of the codes."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Scheduled settings at this step, by name (g, tau)."""


@dataclass(frozen=True, slots=True)
class InferenceForm:
    """Part of a latent space that is used after training: z as a function of the prompt, without the posterior."""

    kind: str
    """Type of the function: `discrete`, `gaussian`, `mlp` or `vector`."""
    settings: Mapping[str, Any]
    """JSON values by name. Always holds `prior_mode`, and `num_codes` if there is a codebook."""
    tensors: Mapping[str, Tensor]
    """Weights of the function by name, detached. They may share memory with the space's parameters."""


class LatentSpace(nn.Module, ABC):
    """Preference representation z for each pair, added to the hidden states before the LM head.

    A space is declared before the policy is loaded: `__init__` stores settings, and `build` creates the parameters.

    Its parameters, and so their optimizer state, are float32 under every precision (float64 under `64-true`). In
    bfloat16, a step of a code below 1/256 of an entry would be lost.
    """

    num_codes: int = 0
    """Number of vectors in the codebook. 0 without one."""
    has_codes: bool = False
    """True if the space has a distribution over the vectors of its codebook for each prompt."""
    scores_codes: bool = False
    """True if training scores every pair under every code."""
    annotators: bool = False
    """True if each pair is scored given the earlier pairs of its annotator."""
    narrow: bool = False
    """True lets a trainer of `bf16-true` convert the parameters. FSDP2 needs one type for all trained weights."""

    def __init__(
        self, detach: bool = False, hidden: int = 256, standardize: bool = True, warm_start_pairs: int = 0
    ) -> None:
        """Store the settings that all spaces share.

        Args:
            detach: Stop the gradient from the prior and posterior networks into the backbone.
            hidden: Width of the hidden layer of the prior and posterior networks.
            standardize: Standardize the states that these networks read, with a running mean and deviation. Otherwise
                almost no information about the prompt reaches them (see `RunningMoments`).
            warm_start_pairs: Maximum number of training pairs to which the space is fitted before the first step, on a
                linearized policy (see `algorithms.warm_start` and docs/latent_spaces.md). The codes are fitted to all
                of these pairs at once. At least six pairs, and two for each code. 0: no warm start.

        Raises:
            ValueError: `hidden` is below 1, or `warm_start_pairs` is negative.
        """
        super().__init__()
        if hidden < 1:
            raise ValueError(f"latent.hidden: found {hidden}, expected at least 1.")
        if warm_start_pairs < 0:
            raise ValueError(f"latent.warm_start_pairs: found {warm_start_pairs}, expected at least 0.")
        self.warm_start_pairs = warm_start_pairs
        self.networks = NetworkSettings(hidden, detach, standardize)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> LatentSpace:
        """Apply `fn` as torch does (`to`, `half` ...), but keep floating-point tensors in float32 or wider."""
        super()._apply(fn if self.narrow else at_least_float32(fn), *args, **kwargs)
        return self

    def settings_of_batch(self) -> list[str]:
        """Return the settings that compare the pairs of a batch, so that a batch needs several."""
        return ["latent.annotators"] * self.annotators

    @abstractmethod
    def build(self, width: int, head: LogitHead) -> None:
        """Create the parameters for a policy of hidden width d = `width` with this LM head."""

    @abstractmethod
    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the loss of each labelled pair at `progress` (0 at the first optimizer step, 1 at the last)."""

    def update_moments(self, alike: bool = False) -> None:
        """Add the pairs read since the last optimizer step to the running moments. Call it before each optimizer step.

        Args:
            alike: True if all devices have read the same pairs. They then count once.
        """
        for part in self.modules():
            if isinstance(part, RunningMoments):
                part.update(alike)

    def forget_unread(self) -> None:
        """Forget the pairs read since the last optimizer step, which a run that was interrupted leaves behind."""
        for part in self.modules():
            if isinstance(part, RunningMoments):
                part.forget_unread()

    @abstractmethod
    def infer(self, prompt: Tensor, mode: PriorMode | None = None) -> Tensor:
        """Compute z (B, d) from the states at the last prompt tokens (B, d).

        Args:
            prompt: (B, d) h_x.
            mode: How z is taken from the prior. None uses the space's own setting.
        """

    @abstractmethod
    def inference_form(self) -> InferenceForm:
        """Return the settings and tensors that `infer` needs. This part of the space is exported."""

    @property
    def codes(self) -> Tensor:
        """Codes (K, d) of a space with `has_codes`.

        Raises:
            NotImplementedError: The space has no codes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no codes.")

    def mix(self, weights: Tensor) -> Tensor:
        """Compute z (B, d) from weights (B, K) of the codebook's vectors, if there is a codebook.

        Raises:
            NotImplementedError: There is no codebook.
        """
        raise NotImplementedError(f"{type(self).__name__} has no codebook.")

    def imitation_loss(self, states: PairStates, codes: Tensor) -> Tensor:
        """Compute the cross-entropy (B,), in nats, of given `codes` (B,) under the networks, with `has_codes`.

        Raises:
            NotImplementedError: The space has no codes.
        """
        raise NotImplementedError(f"{type(self).__name__} has no codes.")

    def log_prior(self, prompt: Tensor) -> Tensor | None:
        """Compute log-probabilities (B, K) of the codes given the prompts. Return None without codes."""
        return None

    def log_posterior(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """Compute log-probabilities (B, K) of the codes given the labelled pairs. Return None without a posterior."""
        return None

    def log_exact_posterior(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """Compute the log of p_k exp(-l_k) / sum_j p_j exp(-l_j): (B, K), for any estimator. None without codes."""
        return None

    def posterior_z(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """Compute z (B, d) at the mean of the posterior, which uses the label. None without one. For evaluation."""
        return None

    def updated_log_prior(self, log_prior: Tensor, log_likelihoods: Tensor, states: PairStates) -> Tensor:
        """Compute the log-prior (B, K) that scores each pair, from the prior of its prompt and the pairs before it.

        It is `log_prior`, unless the space pools the pairs of an annotator.

        Args:
            log_prior: (B, K) log-probabilities of the codes given the prompts.
            log_likelihoods: (B, K) log-likelihoods of the labels under each code.
            states: The pairs, of which annotators and contents are used.
        """
        return log_prior

    def log_evidence(self, prompt: Tensor, score: PairScorer) -> Tensor | None:
        """Compute log sum_k p_k exp(-l_k) (B,), where l_k is the pair's loss under code k. None without codes.

        Each pair stands alone: earlier pairs of its annotator do not change p_k.
        """
        return None

    def label_correct(self, prompt: Tensor, score: PairScorer) -> Tensor | None:
        """Compute the posterior that labels are correct (B,). None without codes, or if the loss does not infer it."""
        return None

    def adaptation_values(
        self, states: PairStates, score: PairScorer, preference: PairScorer, opposite: PairScorer
    ) -> dict[str, Tensor]:
        """Compute the values (B, K) of labelled pairs from which an annotator's weights of the codes are inferred.

        Args:
            states: Hidden states of the pairs.
            score: Losses of the labels.
            preference: Losses of the labels if they are surely right.
            opposite: Losses of the opposite labels if they are surely right.

        Returns:
            By name. With `has_codes`: `log_prior`, and under each code, in nats, the log-likelihoods `evidence` of the
            labels, and the negative log-likelihoods `losses` of the preferences and `swapped` of the opposite ones.
            With a posterior network also `log_posterior`. With continuous weights: their means `prior_mean` and
            `posterior_mean`. Empty without a codebook.
        """
        return {}

    def label_log_likelihood(self, states: PairStates, score: PairScorer) -> Tensor:
        """Compute the log-likelihood (B,) of the labels, in nats: exact with `has_codes`, else under the prior's z."""
        return self.inference_terms(states, score).pairs.label_log_likelihood

    def inference_terms(self, states: PairStates, score: PairScorer) -> LatentTerms:
        """Compute the loss of each pair under the prior alone, as at inference. The posterior is not evaluated."""
        z = self.infer(states.prompt)
        return LatentTerms(*score.under(z), z=z, prior=self.log_prior(states.prompt))
