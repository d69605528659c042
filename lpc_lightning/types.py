"""The values that travel through the suite. Every tensor's shape is told here, once.

Letters: B pairs in a batch, R rows of tokens, T tokens in a row, N completion tokens to score, K codes, d hidden width.
The 2B sequences of a batch stand in one order everywhere: the B chosen ones, then the B rejected ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

PIECES = 4096
"""A prompt and its completions have segment numbers of one such block: see `PreferenceBatch.segments`."""


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """One labelled comparison, as text: `chosen` was preferred over `rejected` as the answer to `prompt`."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str = ""
    """Where the pair comes from (a data set, a domain)."""
    factor: str = ""
    """The preference factor that decided, where it is known."""
    annotator: str = ""
    """Who labelled the pair, where it is known."""
    flipped: bool = False
    """True where label noise has swapped the two answers."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Any further columns of the row, untouched."""

    def swapped(self) -> PreferenceExample:
        """The same comparison labelled the other way round."""
        return replace(self, chosen=self.rejected, rejected=self.chosen, flipped=not self.flipped)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The best accuracies that can be expected on some data, where its makers know what decides."""

    from_prompt: float
    """Of a predictor that sees the prompt and both answers."""
    given_annotator: float
    """Of one that knows as well who labelled the pair, and what that annotator wants."""


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A `PreferenceExample` as token ids. The prompt's ids are a true prefix of both sequences.

    Each completion ends with exactly one end-of-answer token, unless the length policy cut it.
    """

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    source: str = ""
    factor: str = ""
    annotator: str = ""
    flipped: bool = False
    place: int = 0
    """Its number among the examples that were read, from 0: some of them may have been left out."""
    reference_logps: tuple[float, float] | None = None
    """Log-probabilities of the chosen and the rejected answer under the reference, in nats, where they are cached."""

    def swapped(self) -> TokenizedPair:
        """The same pair labelled the other way round: all that belongs to an answer goes with it."""
        logps = self.reference_logps
        return replace(
            self,
            chosen_ids=self.rejected_ids,
            rejected_ids=self.chosen_ids,
            flipped=not self.flipped,
            reference_logps=None if logps is None else (logps[1], logps[0]),
        )


@dataclass(slots=True)
class PreferenceBatch:
    """Tokens, and where to read: nothing after the backbone knows how the tokens are laid out.

    Not frozen: a trainer of `bf16-true`, `16-true` or `64-true` rebuilds each batch field by field. Change none.
    """

    input_ids: Tensor
    """(R, T) tokens, right-padded."""
    position_ids: Tensor
    """(R, T) position of each token in its own sequence."""
    attention_mask: Tensor
    """(R, T) 1 at tokens, 0 at padding."""
    segments: Tensor | None
    """(R, T) which piece each token belongs to, for rows that hold several pieces: `j PIECES` the row's j-th
    prompt, `j PIECES + c` its c-th completion (1 the chosen, 2 the rejected), -1 padding. None where a row is one plain
    sequence."""
    read_at: Tensor
    """(N,) positions in the flattened (R T) tokens whose next token is a completion token."""
    targets: Tensor
    """(N,) that completion token."""
    owner: Tensor
    """(N,) which of the 2B sequences it belongs to."""
    prompt_end: Tensor
    """(B,) flat position of the last prompt token: where h_x is."""
    completion_end: Tensor
    """(2B,) flat position of the last completion token: where h_w and h_l are."""
    lengths: Tensor
    """(2B,) completion tokens in each sequence."""
    flipped: Tensor
    """(B,) bool: label noise swapped the pair."""
    ids: tuple[str, ...]
    sources: tuple[str, ...]
    factors: tuple[str, ...]
    annotators: tuple[str, ...]
    tokens: int
    """Tokens that the backbone reads, padding not counted. Counted when the batch is laid out: the sum of a mask on a
    GPU would have the CPU wait for it."""
    reference_bits: Tensor | None = None
    """(2B,) `reference_logps`, the bits of each float64 number as an int64. A trainer of `bf16-true` casts the
    floating-point tensors of a batch, and three digits would be left."""

    @property
    def pairs(self) -> int:
        """B."""
        return self.prompt_end.shape[0]

    @property
    def reference_logps(self) -> Tensor | None:
        """(2B,) log-probabilities under the reference, in nats, float64; None unless they are cached for all pairs."""
        return None if self.reference_bits is None else self.reference_bits.view(torch.float64)

    def _on_tensors(self, change: Callable[[Tensor], Tensor]) -> PreferenceBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """The same batch on `device`.

        The CPU does not wait for the copy to a GPU. (Lightning passes `non_blocking` for plain tensors alone.) It does
        wait for the copy to a CPU, whose values may be read at once.
        """
        non_blocking = torch.device(device).type not in ("cpu", "mps")
        return self._on_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreferenceBatch:
        """The same batch in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self._on_tensors(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True, slots=True)
class PairStates:
    """What speaks for a pair: hidden states (last layer, after the final norm, what enters the head), and a name."""

    prompt: Tensor
    """(B, d) h_x, at the last prompt token."""
    chosen: Tensor
    """(B, d) h_w, at the last token of the chosen answer."""
    rejected: Tensor
    """(B, d) h_l, at the last token of the rejected answer."""
    annotators: tuple[str, ...] = ()
    """(B,) who labelled each pair, "" where that is not known; empty where nobody is."""


@dataclass(frozen=True, slots=True)
class LogitHead:
    """How a policy turns hidden states into logits: `cap(scale * (weight h + bias))`."""

    weight: Tensor
    """(V, d)."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    """Multiplies the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Gemma's soft cap c: logits become c tanh(logits / c). None: the head is linear."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of both answers, each (B,), summed over completion tokens, in nats. References may be None.

    The policy's may be (B, K), one column a code; the others are then (B, 1), so that every loss broadcasts.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_lengths: Tensor
    """Completion tokens of the chosen answer."""
    rejected_lengths: Tensor


@dataclass(frozen=True, slots=True)
class PairLosses:
    """What a preference loss says of each pair, each (B,) or (B, K) like the policy's log-probabilities."""

    losses: Tensor
    chosen_rewards: Tensor
    """Implicit reward of the chosen answer, scaled by beta, without gradient."""
    rejected_rewards: Tensor
    log_likelihood: Tensor | None = None
    """Of each label, in nats, up to a constant. None: the loss is a negative log-likelihood itself."""
    parts: tuple[tuple[float, Tensor], ...] = ()
    """Weights and log-likelihoods of which the loss is the negative sum. Empty: it is -`label_log_likelihood`."""

    @property
    def label_log_likelihood(self) -> Tensor:
        """Log-likelihood of each label, in nats, up to a constant: what tells one code from another."""
        return -self.losses if self.log_likelihood is None else self.log_likelihood

    def of_mixture(self, log_weights: Tensor) -> Tensor:
        """(B,) the loss of a mixture of codes, of log-weights (B, K): likelihoods are averaged before the logarithm."""
        parts = self.parts or ((1.0, self.label_log_likelihood),)
        return torch.stack([-weight * (log_weights + part).logsumexp(-1) for weight, part in parts]).sum(0)
