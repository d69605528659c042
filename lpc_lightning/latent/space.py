"""What every latent space is: parameters, a training step, and a z inferred from the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from lpc_lightning.latent.moments import RunningMoments
from lpc_lightning.latent.networks import NetworkSettings
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates

PriorMode = Literal["mean", "sample", "argmax"] | int
"""How z is taken from the prior at inference: its mean (sum_k p_k e_k), a draw, the likeliest code, or code k."""


class PairScorer(Protocol):
    """The algorithm's loss as a function of the latent: all that a latent space knows of the policy."""

    def under(self, z: Tensor | None) -> tuple[PairLosses, PairLogps]:
        """Losses and log-probabilities, (B,) each, with each pair's z (B, d) added before the head."""
        ...

    def under_codes(self, codes: Tensor) -> tuple[PairLosses, PairLogps]:
        """The same under every code of a codebook (K, d): (B, K) each."""
        ...


@dataclass(frozen=True, slots=True)
class LatentTerms:
    """What a step makes of each pair."""

    pairs: PairLosses
    """(B,) preference losses with gradient, and rewards: expectations over the codes where the loss is one."""
    logps: PairLogps
    """(B,) log-probabilities, like the rewards."""
    penalty: Tensor | float = 0.0
    """(B,) what the latent adds to the losses (lambda KL), with gradient."""
    z: Tensor | None = None
    """(B, d) the representation that the policy answered under."""
    kl: Tensor | None = None
    """(B,) KL from prior to posterior before weighting, in nats."""
    prior: Tensor | None = None
    """(B, K) prior log-probabilities of the codes."""
    posterior: Tensor | None = None
    """(B, K) posterior log-probabilities of the codes."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Scheduled settings at this step, by name (g, tau)."""


@dataclass(frozen=True, slots=True)
class InferenceForm:
    """What is left of a latent space once training is over: z as a function of the prompt, without any posterior."""

    kind: str
    """`discrete`, `gaussian`, `mlp` or `vector`: which function."""
    settings: Mapping[str, Any]
    """JSON values by name; `prior_mode` always, `codes` where there is a codebook."""
    tensors: Mapping[str, Tensor]
    """The function's weights by name, detached; they may share memory with the space's parameters."""


class LatentSpace(nn.Module, ABC):
    """A preference representation z for each pair, added to the hidden states before the LM head.

    A space is declared before the policy is known: `__init__` keeps settings, `build` makes the parameters.
    """

    def __init__(
        self, detach: bool = False, hidden: int = 256, standardise: bool = True, warm_start_pairs: int = 0
    ) -> None:
        """Keep the settings that all spaces share.

        Args:
            detach: Read the hidden states that feed prior and posterior without sending gradient into the backbone.
            hidden: Width of the hidden layer of the prior and posterior networks.
            standardise: Have these networks read what tells the states apart: less their running mean, over their
                running deviation. Unless that is done they hardly see the prompt (see `RunningMoments`).
            warm_start_pairs: Training pairs, at most, to which the space is fitted before the first step, in a sketch
                of the policy (see `algorithms.warm_start` and docs/latent_spaces.md). Codes are then found by
                looking at all of them at once. At least two for each code. 0: none.

        Raises:
            ValueError: `hidden` is below 1, or `warm_start_pairs` is negative.
        """
        super().__init__()
        if hidden < 1:
            raise ValueError(f"latent.hidden: found {hidden}, expected at least 1.")
        if warm_start_pairs < 0:
            raise ValueError(f"latent.warm_start_pairs: found {warm_start_pairs}, expected at least 0.")
        self.warm_start_pairs = warm_start_pairs
        self.networks = NetworkSettings(hidden, detach, standardise)

    @abstractmethod
    def build(self, width: int, head: LogitHead) -> None:
        """Make the parameters for a policy of hidden width d = `width` with this LM head."""

    @abstractmethod
    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """The loss of each labelled pair at `progress` (0 at the first optimizer step, 1 at the last)."""

    def close_window(self, alike: bool = False) -> None:
        """Called before each optimizer step: what training has read since the last one joins the running moments.

        Args:
            alike: All devices have read the same pairs, which count once.
        """
        for part in self.modules():
            if isinstance(part, RunningMoments):
                part.close_window(alike)

    @abstractmethod
    def infer(self, prompt: Tensor, mode: PriorMode | None = None) -> Tensor:
        """z (B, d) from the states at the last prompt tokens (B, d), by `mode` (None: the space's own setting)."""

    @abstractmethod
    def inference_form(self) -> InferenceForm:
        """What `infer` needs, as settings and tensors: the part of the space that is exported."""

    def log_prior(self, prompt: Tensor) -> Tensor | None:
        """(B, K) log-probabilities of the codes given the prompts, or None where there are no codes."""
        return None

    def log_posterior(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """(B, K) log-probabilities of the codes given the labelled pairs, or None where there is no such thing."""
        return None

    def log_exact_posterior(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """(B, K) log of p_k exp(-l_k) / sum_j p_j exp(-l_j), however the space was trained; None without codes."""
        return None

    def posterior_z(self, states: PairStates, score: PairScorer) -> Tensor | None:
        """z (B, d) at the mean of the posterior, which sees the label; None without one. For evaluation."""
        return None

    def log_evidence(self, prompt: Tensor, score: PairScorer) -> Tensor | None:
        """(B,) log sum_k p_k exp(-l_k), l_k the pair's loss under code k; None where there are no codes."""
        return None

    def inference_terms(self, states: PairStates, score: PairScorer) -> LatentTerms:
        """The loss of each pair as the policy is used: under the prior alone. No posterior runs."""
        z = self.infer(states.prompt)
        return LatentTerms(*score.under(z), z=z, prior=self.log_prior(states.prompt))
