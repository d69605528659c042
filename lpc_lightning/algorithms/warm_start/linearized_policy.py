"""Labelled pairs under a linearized policy, in which log pi(y|x, z) is a closed form in z.

Under z, token y_t has the log-probability log p_t(y_t) + w_y z - log sum_v p_t(v) exp(w_v z). Its value and gradient at
z = 0 are exact, and are summed over each answer. In the higher orders of the normalizer, p_t is replaced by its mean p
over all tokens. For an answer of n tokens with z-gradient g this gives
log pi(y|x, z) = log pi(y|x) + g z - n KL(p, p_z), with p_z(v) proportional to p(v) exp(w_v z). Without the KL term,
large codes would have no cost, and long answers would lose nothing under them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpc_lightning.algorithms.latent_mixin import BatchScorer
from lpc_lightning.policy.logprobs import code_logits
from lpc_lightning.types import LogitHead, PairLogps, PairLosses, PairStates, PreferenceBatch


@dataclass(frozen=True, slots=True)
class MeanToken:
    """Mean distribution of the policy's next token over all tokens of the answers."""

    head: LogitHead
    log_p: Tensor
    """(V,) log-probabilities."""

    def divergence(self, z: Tensor) -> Tensor:
        """Compute KL(p, p_z) in nats, (K,), for z (K, d)."""
        biases = code_logits(self.head, z)
        return (self.log_p + biases).logsumexp(-1) - biases @ self.log_p.exp()


@dataclass(frozen=True, slots=True)
class LinearizedForward:
    """Log-probabilities of a batch under the linearized policy (an `AnswerLogps`)."""

    plain: Tensor
    """(2B,) log-probabilities without z, chosen answers first."""
    z_gradients: Tensor
    """(2B, d) gradients of `plain` with respect to z at z = 0."""
    lengths: Tensor
    """(2B,) numbers of tokens."""
    token: MeanToken
    """The policy's mean token."""

    def logps(self, z: Tensor | None = None) -> Tensor:
        """Return (2B,) log-probabilities under `z` (B, d) of each pair, or without z (None)."""
        if z is None:
            return self.plain
        divergences = self.lengths * self.token.divergence(z).repeat(2)
        return self.plain + (self.z_gradients * z.repeat(2, 1)).sum(-1) - divergences

    def logps_per_code(self, codes: Tensor, code_range: float | None = None) -> Tensor:
        """Return (2B, K) log-probabilities under every code of `codes` (K, d). `code_range` is not used."""
        return self.plain[:, None] + self.z_gradients @ codes.T - self.lengths[:, None] * self.token.divergence(codes)


class LinearizedPairs:
    """Labelled pairs under the linearized policy: 5 d + 4 numbers each, and two of the reference."""

    def __init__(
        self,
        rows: Tensor,
        reference: Tensor | None,
        token: MeanToken,
        annotators: Sequence[str],
        loss: Callable[[PairLogps], PairLosses],
        target_margins: Tensor | None = None,
        contents: Sequence[str] = (),
    ) -> None:
        """Split the rows into their parts.

        Args:
            rows: (N, 5 d + 4), see `make_rows`.
            reference: (N, 2) log-probabilities of both answers under the reference. None without a reference.
            token: The policy's mean token.
            annotators: (N,) annotator of each pair, "" if unknown.
            loss: The preference loss.
            target_margins: (N,) target margins of the loss. None: 0.
            contents: (N,) `pair_content` of each pair. Empty: no pair is a copy of another.
        """
        self._rows, self.reference, self._token, self._loss = rows, reference, token, loss
        self._target_margins = target_margins
        self.annotators, self._contents = tuple(annotators), tuple(contents)
        width = token.head.weight.shape[1]
        states, z_gradients, self.plain, self.lengths = rows.split([3 * width, 2 * width, 2, 2], dim=1)
        self.prompt, self.chosen, self.rejected = states.split(width, dim=1)
        self.z_gradients = z_gradients.unflatten(1, (2, width))

    def __len__(self) -> int:
        return len(self.prompt)

    def part(self, chosen: slice) -> LinearizedPairs:
        """Return some of the pairs."""
        reference = None if self.reference is None else self.reference[chosen]
        margins = None if self._target_margins is None else self._target_margins[chosen]
        names, contents = self.annotators[chosen], self._contents[chosen]
        return LinearizedPairs(self._rows[chosen], reference, self._token, names, self._loss, margins, contents)

    @property
    def z_gradient_difference(self) -> Tensor:
        """(N, d) gradients of log pi(y_w|x, z) - log pi(y_l|x, z): the direction of z that favours the label most."""
        return self.z_gradients[:, 0] - self.z_gradients[:, 1]

    def select(self, indices: Tensor) -> tuple[PairStates, BatchScorer]:
        """Return the states of the pairs at `indices` (B,), and their losses as a function of z."""
        plain, lengths = (values[indices].T.flatten() for values in (self.plain, self.lengths))
        reference = None if self.reference is None else self.reference[indices].T.flatten()
        z_gradients = self.z_gradients[indices].transpose(0, 1).flatten(0, 1)
        forward = LinearizedForward(plain, z_gradients, lengths, self._token)
        names, contents = (
            tuple(values[index] for index in indices.tolist()) if values else ()
            for values in (self.annotators, self._contents)
        )
        states = PairStates(self.prompt[indices], self.chosen[indices], self.rejected[indices], names, contents)
        margins = None if self._target_margins is None else self._target_margins[indices]
        return states, BatchScorer(forward, lengths, reference, self._loss, target_margins=margins)


def make_rows(states: PairStates, plain: Tensor, z_gradients: Tensor, batch: PreferenceBatch) -> Tensor:
    """Return (B, 5 d + 4) float32 rows: h_x, h_w, h_l, both z-gradients, both log-probabilities and both lengths.

    Args:
        states: States of the batch's pairs.
        plain: (2B,) log-probabilities of the answers without z.
        z_gradients: (2B, d) gradients of the log-probabilities with respect to z.
        batch: The batch.
    """
    answer_parts = [
        torch.cat(values.chunk(2), dim=1) for values in (z_gradients, plain[:, None], batch.lengths[:, None])
    ]
    parts = [states.prompt, states.chosen, states.rejected, *answer_parts]
    return torch.cat([part.detach().float() for part in parts], dim=1)


def swap_labels(rows: Tensor, swaps: Tensor) -> Tensor:
    """Return the rows with the opposite label where `swaps` (N,) is True."""
    width = (rows.shape[1] - 4) // 5
    prompt, *answer_parts = rows.split([width, 2 * width, 2 * width, 2, 2], dim=1)
    swapped = [torch.cat(values.chunk(2, dim=1)[::-1], dim=1) for values in answer_parts]
    return torch.where(swaps[:, None], torch.cat([prompt, *swapped], dim=1), rows)
