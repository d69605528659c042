"""What every latent space is: parameters, a training step, and a z inferred from the prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

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


class LatentSpace(nn.Module, ABC):
    """A preference representation z for each pair, added to the hidden states before the LM head.

    A space is declared before the policy is known: `__init__` keeps settings, `build` makes the parameters.
    """

    def __init__(self, detach: bool = False, hidden: int = 256) -> None:
        """Keep the settings that all spaces share.

        Args:
            detach: Read the hidden states that feed prior and posterior without sending gradient into the backbone.
            hidden: Width of the hidden layer of the prior and posterior networks.
        """
        super().__init__()
        self.detach, self.hidden = detach, hidden

    @abstractmethod
    def build(self, width: int, head: LogitHead) -> None:
        """Make the parameters for a policy of hidden width d = `width` with this LM head."""

    @abstractmethod
    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """The loss of each labelled pair at `progress` (0 at the first optimizer step, 1 at the last)."""

    @abstractmethod
    def infer(self, prompt: Tensor, mode: PriorMode | None = None) -> Tensor:
        """z (B, d) from the states at the last prompt tokens (B, d), by `mode` (None: the space's own setting)."""

    def log_prior(self, prompt: Tensor) -> Tensor | None:
        """(B, K) log-probabilities of the codes given the prompts, or None where there are no codes."""
        return None

    def inference_terms(self, states: PairStates, score: PairScorer) -> LatentTerms:
        """The loss of each pair as the policy is used: under the prior alone. No posterior runs."""
        z = self.infer(states.prompt)
        return LatentTerms(*score.under(z), z=z, prior=self.log_prior(states.prompt))
