"""Latent Preference Coding on top of any algorithm: a batch's losses as a function of the latent, and their use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol

from torch import Tensor, nn

from lpc_lightning.latent import LatentSpace, LatentTerms, PairScorer
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates


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


class AnswerLogps(Protocol):
    """Log-probabilities of a batch's answers as a function of z (see `BatchForward`)."""

    def logps(self, z: Tensor | None = None) -> Tensor:
        """Return (2B,) log-probabilities under `z` (B, d) of each pair, or without z (None)."""
        ...

    def logps_per_code(self, codes: Tensor, code_range: float | None = None) -> Tensor:
        """Return (2B, K) log-probabilities under every code of `codes` (K, d).

        See `token_logps_per_code` for `code_range`.
        """
        ...


class BatchScorer:
    """Losses and log-probabilities of one batch under any z, from one backbone pass (a `PairScorer`)."""

    reference: Tensor | None
    """(2B,) log-probabilities under the reference. None for an algorithm without a reference."""

    def __init__(
        self,
        forward: AnswerLogps,
        lengths: Tensor,
        reference: Tensor | None,
        loss: Callable[[PairLogps], PairLosses],
        code_range: float | None = None,
        target_margins: Tensor | None = None,
        preference_loss: Callable[[PairLogps], PairLosses] | None = None,
    ) -> None:
        """Keep the values that do not depend on z.

        Args:
            forward: Result of the policy's backbone pass.
            lengths: (2B,) completion tokens of each sequence.
            reference: (2B,) log-probabilities under the reference. None for an algorithm without a reference.
            loss: The preference loss.
            code_range: See `token_logps_per_code`.
            target_margins: (B,) target margins of the loss. None: 0.
            preference_loss: The loss of labels that are surely right. None: `loss`.
        """
        self._target_margins = target_margins
        self._preference_loss = preference_loss or loss
        self._forward, self._lengths, self.reference, self._loss = forward, lengths, reference, loss
        # Several values of a batch are computed under the same codes. They share one pass through the head.
        self._logps_per_code = lru_cache(maxsize=1)(partial(forward.logps_per_code, code_range=code_range))
        self._swapped = False

    def under(self, z: Tensor | None) -> tuple[PairLosses, PairLogps]:
        """Compute (B,) losses and log-probabilities with z (B, d) added before the head. None: the plain policy."""
        return self._score(self._forward.logps(z), self._lengths, self.reference, self._target_margins)

    def under_codes(self, codes: Tensor) -> tuple[PairLosses, PairLogps]:
        """Compute (B, K) losses and log-probabilities under every code of `codes` (K, d)."""
        reference = None if self.reference is None else self.reference[:, None]
        target_margins = None if self._target_margins is None else self._target_margins[:, None]
        return self._score(self._logps_per_code(codes), self._lengths[:, None], reference, target_margins)

    def rescaled(self, scale: Callable[[PairLogps], PairLogps]) -> BatchScorer:
        """Return a scorer whose loss receives rescaled log-probabilities. It shares those per code."""
        other, loss, preference_loss = copy.copy(self), self._loss, self._preference_loss
        other._loss = lambda logps: loss(scale(logps))
        other._preference_loss = lambda logps: preference_loss(scale(logps))
        return other

    def without_label_noise(self) -> BatchScorer:
        """Return a scorer of the preferences: the labels are surely right. It shares the log-probabilities per code.

        A robust loss gives the likelihood of a label that may be wrong. For an annotator whose labels are mostly wrong,
        the likelier label is not the preferred one.
        """
        other = copy.copy(self)
        other._loss = self._preference_loss
        return other

    def losses(self, logps: PairLogps) -> PairLosses:
        """Compute the losses of log-probabilities that `under` or `under_codes` returned."""
        return self._loss(logps)

    def swapped(self) -> BatchScorer:
        """Return a scorer of the same pairs with the opposite labels. It shares the log-probabilities per code.

        The target margins are the same, now for the other answer (see `PreferenceExample.margin`).
        """
        other = copy.copy(self)
        other._swapped = not self._swapped
        return other

    def _score(
        self, policy: Tensor, lengths: Tensor, reference: Tensor | None, target_margins: Tensor | None
    ) -> tuple[PairLosses, PairLogps]:
        of_chosen, of_rejected = (None, None) if reference is None else self._pair(reference.to(policy.dtype))
        lengths = lengths.to(policy.dtype)
        margins = None if target_margins is None else target_margins.to(policy.dtype)
        logps = PairLogps(*self._pair(policy), of_chosen, of_rejected, *self._pair(lengths), margins)
        return self._loss(logps), logps

    def _pair(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Split values (2B, ...) into (B, ...) of the chosen and (B, ...) of the rejected answers."""
        first, second = values.chunk(2)
        return (second, first) if self._swapped else (first, second)
