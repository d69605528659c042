"""Data classes that all parts share. The shape of every tensor is documented here, once.

Letters: B pairs in a batch, R rows of tokens, T tokens in a row, N completion tokens to score, K codes, d hidden width.
The 2B sequences of a batch have one order everywhere: the B chosen ones, then the B rejected ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, TypedDict

import torch
from torch import Tensor

from lpc_lightning.errors import ConfigError

PIECES = 4096
"""Size of the block of segment numbers for one prompt and its completions (see `PreferenceBatch.segments`)."""


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
    """The preference factor that decided the label. Empty if unknown."""
    annotator: str = ""
    """Name of the annotator who labelled the pair. Empty if unknown."""
    flipped: bool = False
    """True if the label is known to be wrong: the gold label prefers the other answer, or label noise has swapped the
    answers (and not both)."""
    has_gold: bool = False
    """True if the pair has a gold label (see `Columns.gold`)."""
    weight: float | None = None
    """Weight of the pair in the loss, at least 0. None: 1."""
    margin: float | None = None
    """Target margin of the loss, in units of the reward (see `losses`). None: 0. It belongs to the label: with the
    opposite label, it is the target margin of the other answer."""
    question: tuple[Message, ...] = ()
    """The prompt without the name (see `Columns.named_in_prompt`) or the marker (see `LabelFlipNoise`) that was written
    into it. Empty: it has neither, and the question is the prompt."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """The other columns of the row, unchanged."""

    def swapped(self) -> PreferenceExample:
        """Return the same comparison with the opposite label, and the same weight and margin."""
        return replace(self, chosen=self.rejected, rejected=self.chosen, flipped=not self.flipped)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """Best expected accuracies on a data set whose labelling rule is known."""

    from_prompt: float
    """Accuracy of the best predictor that reads the prompt and both answers."""
    given_annotator: float
    """Accuracy of the best predictor that also has the annotator and the annotator's preference factor."""


def token_hash(ids: bytes) -> str:
    """Return 16 hexadecimal digits, a hash of token ids, which are given as the bytes of 64-bit integers."""
    return blake2b(ids, digest_size=8).hexdigest()


def pair_content(prompt: str, answers: Iterable[str]) -> str:
    """Return what a pair consists of, from hashes of its prompt and answers. Copies of a pair have the same.

    A copy may have the other label, and another id.
    """
    return " ".join([prompt, *sorted(answers)])


@dataclass(frozen=True, slots=True)
class TokenizedPair:
    """A `PreferenceExample` as token ids. The prompt's ids are an exact prefix of both sequences.

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
    has_gold: bool = False
    weight: float | None = None
    margin: float | None = None
    question: str = ""
    """`token_hash` of the question's tokens, if a name or a marker was written into the prompt, or the prompt was cut.
    Empty: the question is the prompt."""
    index: int = 0
    """Position of the pair among all examples of the source, from 0. Dropped examples are counted too."""
    reference_logps: tuple[float, float] | None = None
    """Log-probabilities of the chosen and the rejected answer under the reference, in nats. None if not cached."""

    @property
    def prompt(self) -> str:
        """A hash of the prompt's tokens, the same for all pairs of one prompt, whatever was written into it or cut."""
        return self.question or token_hash(array("q", self.prompt_ids).tobytes())

    @property
    def answers(self) -> tuple[str, str]:
        """Hashes of the tokens of the chosen and the rejected answer."""
        return token_hash(array("q", self.chosen_ids).tobytes()), token_hash(array("q", self.rejected_ids).tobytes())

    @property
    def content(self) -> str:
        """`pair_content` of the pair."""
        return pair_content(self.prompt, self.answers)

    def swapped(self) -> TokenizedPair:
        """Return the same pair with the opposite label. Tokens and reference log-probabilities are swapped too.

        Weight and margin stay as they are: a wrong label is as strong as the right one.
        """
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
    """Tokens of a batch, and the positions to read. Code after the backbone does not depend on the token layout.

    The class is not frozen, because a trainer with precision `bf16-true`, `16-true` or `64-true` rebuilds each batch
    field by field. Treat all fields as read-only.
    """

    input_ids: Tensor
    """(R, T) tokens, right-padded."""
    position_ids: Tensor
    """(R, T) position of each token in its own sequence."""
    attention_mask: Tensor
    """(R, T) 1 at tokens, 0 at padding."""
    segments: Tensor | None
    """(R, T) segment number of each token, for rows that hold several segments. `j PIECES` is the row's j-th prompt,
    `j PIECES + c` is its c-th completion (1 chosen, 2 rejected), and -1 is padding. None if each row is one plain
    sequence."""
    read_at: Tensor
    """(N,) positions in the flattened (R T) tokens whose next token is a completion token."""
    targets: Tensor
    """(N,) the completion token after each position of `read_at`."""
    owner: Tensor
    """(N,) number of the sequence (0 to 2B - 1) that each target belongs to, in this order; then 2B, for positions that
    only fill up N."""
    prompt_end: Tensor
    """(B,) flat position of the last prompt token. The hidden state h_x is read there."""
    completion_end: Tensor
    """(2B,) flat position of the last completion token. The hidden states h_w and h_l are read there."""
    lengths: Tensor
    """(2B,) number of completion tokens in each sequence."""
    flipped: Tensor
    """(B,) bool, `PreferenceExample.flipped` of each pair."""
    has_gold: tuple[bool, ...]
    """True for pairs with a gold label."""
    ids: tuple[str, ...]
    sources: tuple[str, ...]
    factors: tuple[str, ...]
    annotators: tuple[str, ...]
    prompts: tuple[str, ...]
    """`TokenizedPair.prompt` of each pair. Pairs with the same prompt are not independent."""
    answers: tuple[tuple[str, str], ...]
    """`TokenizedPair.answers` of each pair."""
    tokens: int
    """Tokens that the backbone reads, padding not counted. Counted when the batch is laid out: the sum of a mask on a
    GPU would have the CPU wait for it."""
    planned: bool = False
    """True if the layout has planned this shape. Compiled layers on a GPU run batches of planned shapes."""
    reference_bits: Tensor | None = None
    """(2B,) log-probabilities under the reference, the bits of each float64 number as an int64. None unless they are
    cached for all pairs. A trainer of `bf16-true` casts the floating-point tensors of a batch, and three digits would
    be left."""
    weight_bits: Tensor | None = None
    """(B,) weights, like `reference_bits`. None if the data has no weights."""
    margin_bits: Tensor | None = None
    """(B,) margins, like `reference_bits`. None if the data has no margins."""

    @property
    def contents(self) -> tuple[str, ...]:
        """(B,) `pair_content` of each pair."""
        return tuple(map(pair_content, self.prompts, self.answers))

    @property
    def weights(self) -> Tensor | None:
        """(B,) weight of each pair in the loss, float64. None: all weights are 1."""
        return None if self.weight_bits is None else self.weight_bits.view(torch.float64)

    @property
    def margins(self) -> Tensor | None:
        """(B,) margin of each pair in units of the reward, float64. None: all margins are 0."""
        return None if self.margin_bits is None else self.margin_bits.view(torch.float64)

    @property
    def pairs(self) -> int:
        """Number of pairs, B."""
        return self.prompt_end.shape[0]

    def cached_reference_logps(self) -> Tensor:
        """Return the (2B,) log-probabilities under the reference, in nats, float64.

        Raises:
            ConfigError: They are not cached for all pairs.
        """
        if self.reference_bits is None:
            raise ConfigError(
                f"model.reference: found cached, and pairs without reference log-probabilities (the first is "
                f"{self.ids[0]!r}). Expected batches of a PreferenceDataModule in a run of the trainer. Set "
                "model.reference: live for other batches."
            )
        return self.reference_bits.view(torch.float64)

    def _on_tensors(self, change: Callable[[Tensor], Tensor]) -> PreferenceBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> PreferenceBatch:
        """Return the same batch on `device`.

        The CPU does not wait for the copy to a GPU. (Lightning passes `non_blocking` for plain tensors alone.) It does
        wait for the copy to a CPU, whose values may be read at once.
        """
        non_blocking = torch.device(device).type not in ("cpu", "mps")
        return self._on_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreferenceBatch:
        """Return the same batch in page-locked memory (called by `DataLoader(pin_memory=True)`)."""
        return self._on_tensors(lambda tensor: tensor.pin_memory())


@dataclass(frozen=True, slots=True)
class PairStates:
    """Inputs of a latent space for each pair: hidden states, annotators and contents.

    The hidden states come from the last layer, after the final norm. They are the inputs of the LM head.
    """

    prompt: Tensor
    """(B, d) h_x, at the last prompt token."""
    chosen: Tensor
    """(B, d) h_w, at the last token of the chosen answer."""
    rejected: Tensor
    """(B, d) h_l, at the last token of the rejected answer."""
    annotators: tuple[str, ...] = ()
    """(B,) annotator of each pair, "" if unknown. Empty if no annotator is known."""
    contents: tuple[str, ...] = ()
    """(B,) `pair_content` of each pair. Empty: no pair is a copy of another."""


@dataclass(frozen=True, slots=True)
class LogitHead:
    """Parameters of the map from hidden states to logits: `cap(scale * (weight h + bias))`."""

    weight: Tensor
    """(V, d)."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    """Multiplies the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """Gemma's soft cap c: logits become c tanh(logits / c). None: the head is linear."""
    compiled: bool = False
    """Sums over the vocabulary are compiled, each to one or two kernels."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probabilities of both answers, each (B,), summed over completion tokens, in nats.

    The reference's values are None for an algorithm without a reference. The policy's values may be (B, K), one column
    for each code. The other fields are then (B, 1), so that every loss broadcasts.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_lengths: Tensor
    """Number of completion tokens of the chosen answer."""
    rejected_lengths: Tensor
    """Number of completion tokens of the rejected answer."""
    target_margins: Tensor | None = None
    """Margin by which the loss shifts its target, in units of the reward. None: 0."""


@dataclass(frozen=True, slots=True)
class LossTerm:
    """Term of a loss: a weight times a function of a log-likelihood, which a mixture averages over its codes."""

    log_likelihood: Tensor
    """(B,) or (B, K), in nats."""
    loss: Callable[[Tensor], Tensor] = torch.neg
    """Function of the log-likelihood (B,) or (B, K). Default: the negative log-likelihood."""
    weight: float = 1.0
    is_text: bool = False
    """True for the SFT term, which does not depend on the label."""

    def of(self, log_likelihood: Tensor) -> Tensor:
        """Compute the term for another log-likelihood, such as that of a mixture."""
        return self.weight * self.loss(log_likelihood)

    def scaled(self, factor: float) -> LossTerm:
        """Return the term times `factor`."""
        return replace(self, weight=factor * self.weight)


@dataclass(frozen=True, slots=True)
class PairLosses:
    """Result of a preference loss. Each tensor is (B,) or (B, K), like the policy's log-probabilities."""

    losses: Tensor
    """Loss of each pair, with gradient."""
    chosen_rewards: Tensor
    """Implicit reward of the chosen answer, scaled by beta, without gradient."""
    rejected_rewards: Tensor
    """Implicit reward of the rejected answer, scaled by beta, without gradient."""
    log_likelihood: Tensor | None = None
    """Log-likelihood of each label, in nats, up to a constant. None if the loss is a negative log-likelihood itself."""
    parts: tuple[LossTerm, ...] = ()
    """Terms whose sum is the loss. Empty if the loss is `-label_log_likelihood`."""
    label_correct: Tensor | None = None
    """Posterior probability that each label is correct, without gradient. None if the loss does not infer it."""
    label_losses: Tensor | None = None
    """`losses` without the SFT term. None if there is no such term."""

    @property
    def label_part(self) -> PairLosses:
        """The same without the SFT term."""
        if self.label_losses is None:
            return self
        parts = tuple(term for term in self.parts if not term.is_text)
        return replace(self, losses=self.label_losses, parts=parts, label_losses=None)

    @property
    def margins(self) -> Tensor:
        """Reward margins: the chosen answer's reward minus that of the rejected answer."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def label_log_likelihood(self) -> Tensor:
        """Log-likelihood of the observed label, in nats, up to a constant. With (B, K) values, one column per code."""
        return -self.losses if self.log_likelihood is None else self.log_likelihood

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """Terms of the loss, at least one."""
        return self.parts or (LossTerm(self.label_log_likelihood),)

    def of_mixture(self, log_weights: Tensor) -> Tensor:
        """Compute the loss (B,) of a mixture of codes with log-weights (B, K).

        The likelihoods are averaged over the codes before the logarithm is taken.
        """
        mixed = [term.of((log_weights + term.log_likelihood).logsumexp(-1)) for term in self.terms]
        return torch.stack(mixed).sum(0)

    @property
    def objective(self) -> Tensor:
        """Losses computed from the likelihoods, by which codes and epochs are compared: like `losses`, (B,) or (B, K).

        The two differ for RE-PO alone. Its `losses` have the gradient of `-label_log_likelihood`, but another value. It
        is near 0 if the policy is sure that the label is wrong.
        """
        return torch.stack([term.of(term.log_likelihood) for term in self.terms]).sum(0)
