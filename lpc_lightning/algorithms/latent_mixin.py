"""Latent Preference Coding on top of any algorithm."""

from __future__ import annotations

from torch import nn

from lpc_lightning.latent import LatentSpace, LatentTerms, PairScorer
from lpc_lightning.types import LogitHead, PairStates


class LatentMixin:
    """Use of the latent space in a step. Without a latent space it leaves the plain algorithm unchanged."""

    latent: LatentSpace | None

    def build_latent(self, width: int, head: LogitHead) -> None:
        """Create the space's parameters for a policy of this width and head."""
        if self.latent is not None:
            self.latent.build(width, head)

    def latent_parameters(self) -> list[nn.Parameter]:
        """Return the space's parameters, which are an optimizer group of their own."""
        return [] if self.latent is None else list(self.latent.parameters())

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """Compute the losses of a training step. Without a space they equal the plain algorithm's to the last bit."""
        if self.latent is None:
            return LatentTerms(*score.under(None))
        return self.latent.training_terms(states, score, progress)

    def inference_terms(self, states: PairStates, score: PairScorer) -> LatentTerms:
        """Compute the losses with z from the prior alone, as at inference. Without a space there is no z."""
        if self.latent is None:
            return LatentTerms(*score.under(None))
        return self.latent.inference_terms(states, score)
