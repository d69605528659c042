"""Latent Preference Coding on top of any preference module; inert when there is no latent space."""

from __future__ import annotations

from torch import nn

from lpc_lightning.latent import LatentSpace, LatentTerms, PairScorer
from lpc_lightning.types import LogitHead, PairStates


class LatentMixin:
    """Asks the latent space, where there is one, under which z each pair is to be answered."""

    latent: LatentSpace | None

    def build_latent(self, width: int, head: LogitHead) -> None:
        """Make the space's parameters once the policy's width and head are known."""
        if self.latent is not None:
            self.latent.build(width, head)

    def latent_parameters(self) -> list[nn.Parameter]:
        """The space's parameters: a group of the optimizer of their own."""
        return [] if self.latent is None else list(self.latent.parameters())

    def training_terms(self, states: PairStates, score: PairScorer, progress: float) -> LatentTerms:
        """The step's losses: the latent space's, or the plain algorithm's to the last bit."""
        if self.latent is None:
            return LatentTerms(*score.under(None))
        return self.latent.training_terms(states, score, progress)

    def inference_terms(self, states: PairStates, score: PairScorer) -> LatentTerms:
        """The losses as the policy is used: z from the prior alone, or none."""
        if self.latent is None:
            return LatentTerms(*score.under(None))
        return self.latent.inference_terms(states, score)
