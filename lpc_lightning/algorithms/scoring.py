"""The algorithm's loss as a function of the latent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Protocol, TypedDict

from torch import Tensor

from lpc_lightning.latent import LatentTerms
from lpc_lightning.types import PairLogps, PairLosses, PairStates


class TrainingOutput(TypedDict):
    """What a training step makes of a batch, for the trainer and for callbacks."""

    loss: Tensor
    """What is minimised."""
    losses: Tensor
    """(B,) each pair's loss, the latent's penalty included, without gradient."""
    margins: Tensor
    """(B,) reward margins, without gradient."""
    logged: bool
    """True if metrics are wanted of this step: see `is_logged`."""


class Evaluated(TypedDict):
    """What validation and test make of a batch, for callbacks: further z cost no further backbone pass."""

    terms: LatentTerms
    """Losses, rewards and log-probabilities under the prior."""
    states: PairStates
    """h_x, h_w and h_l."""
    score: BatchScorer
    """The same under any other z."""


class Answers(Protocol):
    """Log-probabilities of a batch's answers under any z, as a `BatchForward` has them."""

    def logps(self, z: Tensor | None = None) -> Tensor:
        """(2B,) under `z` (B, d) of each pair, or without."""
        ...

    def logps_per_code(self, codes: Tensor, code_range: float | None = None) -> Tensor:
        """(2B, K) under every code of `codes` (K, d); see `token_logps_per_code` for `code_range`."""
        ...


class BatchScorer:
    """Losses and log-probabilities of one batch under any z, from one backbone pass (a `PairScorer`)."""

    reference: Tensor | None
    """(2B,) log-probabilities under the reference, where there is one."""

    def __init__(
        self,
        reading: Answers,
        lengths: Tensor,
        reference: Tensor | None,
        loss: Callable[[PairLogps], PairLosses],
        code_range: float | None = None,
    ) -> None:
        """Keep what does not depend on z.

        Args:
            reading: What the policy's backbone pass yields.
            lengths: (2B,) completion tokens of each sequence.
            reference: (2B,) the reference's log-probabilities, or None for an algorithm without one.
            loss: The preference loss.
            code_range: See `token_logps_per_code`.
        """
        self._reading, self._lengths, self.reference, self._loss = reading, lengths, reference, loss
        # Of one batch several things are asked under the same codes: one pass through the head answers them all.
        self._logps_per_code = lru_cache(maxsize=1)(partial(reading.logps_per_code, code_range=code_range))
        self._swapped = False

    def under(self, z: Tensor | None) -> tuple[PairLosses, PairLogps]:
        """(B,) losses and log-probabilities with each pair's z (B, d) added before the head; None: the plain policy."""
        return self._score(self._reading.logps(z), self._lengths, self.reference)

    def under_codes(self, codes: Tensor) -> tuple[PairLosses, PairLogps]:
        """(B, K) losses and log-probabilities under every code of `codes` (K, d)."""
        reference = None if self.reference is None else self.reference[:, None]
        return self._score(self._logps_per_code(codes), self._lengths[:, None], reference)

    def swapped(self) -> BatchScorer:
        """The same pairs labelled the other way round: chosen is rejected. Shares what is known per code."""
        other = copy.copy(self)
        other._swapped = not self._swapped
        return other

    def _score(self, policy: Tensor, lengths: Tensor, reference: Tensor | None) -> tuple[PairLosses, PairLogps]:
        references = (None, None) if reference is None else self._pair(reference)
        logps = PairLogps(*self._pair(policy), *references, *self._pair(lengths.to(policy.dtype)))
        return self._loss(logps), logps

    def _pair(self, values: Tensor) -> tuple[Tensor, ...]:
        """(2B, ...) into those of the chosen and those of the rejected answers, (B, ...) each."""
        first, second = values.chunk(2)
        return (second, first) if self._swapped else (first, second)
