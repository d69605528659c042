"""Labelled pairs under a sketch of the policy: log pi(y|x, z) as a function of z, in closed form.

Under z, token y_t has the log-probability log p_t(y_t) + w_y z - log sum_v p_t(v) exp(w_v z). Value and gradient at
z = 0 are kept, summed over each answer (its pull). In what the normaliser has beyond, p_t is taken for the mean p over
all tokens: log pi(y|x, z) = log pi(y|x) + pull z - n KL(p, p_z), for n tokens, with p_z(v) proportional to
p(v) exp(w_v z). Without that term large codes would seem to cost nothing, and long answers to lose nothing by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_lightning.algorithms.scoring import BatchScorer
from lpc_lightning.policy.logprobs import code_logits
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates, PreferenceBatch


@dataclass(frozen=True, slots=True)
class MeanToken:
    """The distribution of the policy's next token, over all indices."""

    head: LogitHead
    log_p: Tensor
    """(V,)."""

    def divergence(self, z: Tensor) -> Tensor:
        """KL(p, p_z) in nats: z (K, d) to (K,)."""
        biases = code_logits(self.head, z)
        return (self.log_p + biases).logsumexp(-1) - biases @ self.log_p.exp()


@dataclass(frozen=True, slots=True)
class LinearizedForward:
    """What a `BatchForward` is to a batch, in the sketch."""

    plain: Tensor
    """(2B,) log-probabilities without z, chosen answers first."""
    z_gradients: Tensor
    """(2B, d) their gradients with respect to z at z = 0."""
    lengths: Tensor
    """(2B,) tokens."""
    token: MeanToken

    def logps(self, z: Tensor | None = None) -> Tensor:
        """(2B,) under `z` (B, d) of each pair; None: without."""
        if z is None:
            return self.plain
        lost = self.lengths * self.token.divergence(z).repeat(2)
        return self.plain + (self.z_gradients * z.repeat(2, 1)).sum(-1) - lost

    def logps_per_code(self, codes: Tensor, code_range: float | None = None) -> Tensor:
        """(2B, K) under every code of `codes` (K, d). `code_range` is not needed here."""
        return self.plain[:, None] + self.z_gradients @ codes.T - self.lengths[:, None] * self.token.divergence(codes)


class LinearizedPairs:
    """What one pass over labelled pairs keeps of each: 5 d + 4 numbers, and two of the reference."""

    def __init__(
        self,
        rows: Tensor,
        reference: Tensor | None,
        token: MeanToken,
        annotators: Sequence[str],
        loss: Callable[[PairLogps], PairLosses],
    ) -> None:
        """Take the rows apart.

        Args:
            rows: (N, 5 d + 4), as `row_of` makes them.
            reference: (N, 2) log-probabilities of both answers under the reference; None for an algorithm without one.
            token: The policy's mean token.
            annotators: (N,) who labelled each pair.
            loss: The algorithm's loss.
        """
        width = token.head.weight.shape[1]
        states, z_gradients, self.plain, self.lengths = rows.split([3 * width, 2 * width, 2, 2], dim=1)
        self.prompt, self.chosen, self.rejected = states.split(width, dim=1)
        self.z_gradients, self.reference = z_gradients.unflatten(1, (2, width)), reference
        self.annotators, self._token, self._loss = tuple(annotators), token, loss

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def z_gradient_difference(self) -> Tensor:
        """(N, d) gradients of log pi(y_w|x, z) - log pi(y_l|x, z): the direction that a pair wants z to have."""
        return self.z_gradients[:, 0] - self.z_gradients[:, 1]

    def take(self, indices: Tensor) -> tuple[PairStates, BatchScorer]:
        """The states of the pairs at `indices` (B,), and their losses as a function of z."""
        plain, lengths = (values[indices].T.flatten() for values in (self.plain, self.lengths))
        reference = None if self.reference is None else self.reference[indices].T.flatten()
        z_gradients = self.z_gradients[indices].transpose(0, 1).flatten(0, 1)
        reading = LinearizedForward(plain, z_gradients, lengths, self._token)
        states = PairStates(
            self.prompt[indices],
            self.chosen[indices],
            self.rejected[indices],
            tuple(self.annotators[place] for place in indices.tolist()),
        )
        return states, BatchScorer(reading, lengths, reference, self._loss)


def row_of(states: PairStates, plain: Tensor, z_gradients: Tensor, batch: PreferenceBatch) -> Tensor:
    """(B, 5 d + 4) float32: h_x, h_w, h_l, both z_gradients, log-probabilities and lengths.

    Args:
        states: Of the batch's pairs.
        plain: (2B,) log-probabilities of the answers.
        z_gradients: (2B, d) their gradients.
        batch: The batch.
    """
    of_answers = [torch.cat(values.chunk(2), dim=1) for values in (z_gradients, plain[:, None], batch.lengths[:, None])]
    parts = [states.prompt, states.chosen, states.rejected, *of_answers]
    return torch.cat([part.detach().float() for part in parts], dim=1)


def relabelled(rows: Tensor, swaps: Tensor) -> Tensor:
    """Rows of the same pairs, those of `swaps` (N,) bool labelled the other way round."""
    width = (rows.shape[1] - 4) // 5
    prompt, *of_answers = rows.split([width, 2 * width, 2 * width, 2, 2], dim=1)
    swapped = [torch.cat(values.chunk(2, dim=1)[::-1], dim=1) for values in of_answers]
    return torch.where(swaps[:, None], torch.cat([prompt, *swapped], dim=1), rows)
