"""Generate answers of an opened policy under the prior, under codes, or under a mixture of codes."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from lpc_lightning.data import DataError
from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.opening import OpenedPolicy
from lpc_lightning.latent import PriorMode
from lpc_lightning.policy.attention_kernel import finite_masks
from lpc_lightning.seeding import derive, seed_draws
from lpc_lightning.types import Message

log = logging.getLogger(__name__)

Prompt = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Decoding:
    """Settings of decoding.

    Raises:
        ConfigError: A value is out of range, or two values contradict each other.
    """

    max_new_tokens: int = 256
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """Divides the logits before a token is drawn. 0 takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    num_beams: int = 1
    """Beams of a beam search."""
    seed: int = 0
    """Seed of all draws."""
    batch_size: int = 8
    """Prompts that are answered at a time."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: found {getattr(self, name)}, expected at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature: found {self.temperature}, expected a number of at least 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: found {self.top_p}, expected a share above 0 and at most 1.")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(f"top_p: found {self.top_p} at temperature 0, where nothing is drawn; set a temperature.")
        if self.num_beams > 1 and self.temperature:
            raise ConfigError(
                f"num_beams: found {self.num_beams} at temperature {self.temperature}; beams go with temperature 0."
            )


@dataclass(frozen=True, slots=True)
class Condition:
    """Source of z for an answer. Defaults to the prior with the policy's own settings."""

    name: str = "prior"
    prior_mode: PriorMode | None = None
    """How z is taken from the prior. None: the policy's own setting."""
    code_weights: tuple[float, ...] | None = None
    """K weights over the codes, in place of the prior."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to a prompt."""

    under: str
    """Name of the condition."""
    text: str
    tokens: int
    """Length without the end token."""
    finished: bool
    """True if the answer ended with an end token. False at the token limit or at the end of the context."""


def marked(text: str, finished: bool) -> str:
    """Return the text of an answer, with a mark if it is not finished."""
    return text if finished else f"{text} [...]"


def likeliest_codes(prior: Sequence[float], most: int) -> str:
    """Return a line with the likeliest codes: `Likeliest codes under the prior: 3 (0.412), 0 (0.207)`."""
    ranked = sorted(enumerate(prior), key=lambda code: -code[1])[:most]
    codes = ", ".join(f"{code} ({probability:.3f})" for code, probability in ranked)
    return f"Likeliest codes under the prior: {codes}"


@dataclass(frozen=True, slots=True)
class Answered:
    """Prompt with all its answers."""

    prompt: tuple[Message, ...]
    prior: tuple[float, ...] | None
    """(K,) probabilities of the codes given the prompt; None without codes."""
    answers: tuple[Answer, ...]
    """One for each condition."""


def answers(
    opened: OpenedPolicy,
    prompts: Sequence[Prompt],
    conditions: Sequence[Condition] = (Condition(),),
    decoding: Decoding = Decoding(),
) -> Iterator[Answered]:
    """Answer prompts in order, batch by batch.

    A prompt has the same ids as in training. Its draws depend only on the seed and these ids, not on the batch. They
    are the same under every condition, so that answers differ only by z. Changes of the template to texts are logged.

    Args:
        opened: The policy.
        prompts: Conversations that end in a user turn.
        conditions: Sources of z. Without a latent, the answers are the same under all of them.
        decoding: Settings of decoding.

    Raises:
        DataError: The template rejects a prompt, or a prompt fills the context. Raised before generation.
        ValueError: The policy's latent does not have the condition.
    """
    template = make_template(opened.tokenizer, *opened.template)
    encoded, changes = [], Counter[str]()
    for number, prompt in enumerate(prompts, 1):
        changed: dict[str, None] = {}
        try:
            encoded.append(template.prompt_ids(prompt, changed.setdefault))
        except BadRow as fault:
            raise DataError(f"prompt {number}: {fault}") from fault
        changes.update(changed.keys())
    for change, count in changes.items():
        log.warning("%d of %d prompts with a change: %s", count, len(prompts), change)
    generation: Any = opened.policy.causal_lm.generation_config
    published = generation.eos_token_id  # Llama 3 and Qwen end with one of several
    ends = [
        template.end_id,
        opened.tokenizer.eos_token_id,
        *(published if isinstance(published, list) else [published]),
    ]
    writer = _Writer(opened, decoding, ends, pad=template.pad_id)
    rooms = [writer.room(number, ids) for number, ids in enumerate(encoded, 1)]
    return (
        Answered(tuple(prompts[place]), prior, found)
        for batch in _batches(rooms, decoding.batch_size)
        for place, prior, found in zip(
            batch, *writer.write([encoded[place] for place in batch], rooms[batch[0]], conditions), strict=True
        )
    )


def _batches(rooms: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices of consecutive prompts with the same limit on new tokens."""
    for _, run in groupby(range(len(rooms)), key=lambda place: rooms[place]):
        places = list(run)
        yield from (places[start : start + size] for start in range(0, len(places), size))


class _Writer:
    def __init__(self, opened: OpenedPolicy, decoding: Decoding, ends: list[int | None], pad: int) -> None:
        self._opened, self._decoding, self._pad = opened, decoding, pad
        self._ends = sorted({end for end in ends if end is not None})
        self._device = opened.policy.model.device

    def room(self, number: int, ids: list[int]) -> int:
        """Return the limit on new tokens: `max_new_tokens`, or less at the end of the context.

        Raises:
            DataError: The prompt fills the context.
        """
        config = self._opened.policy.causal_lm.config.get_text_config()
        context: int | None = getattr(config, "max_position_embeddings", None)
        if context is None:
            return self._decoding.max_new_tokens
        if len(ids) >= context:
            raise DataError(
                f"prompt {number}: found {len(ids)} tokens, expected fewer than the policy's context of {context}, so "
                "that there is room for an answer. Shorten it."
            )
        return min(self._decoding.max_new_tokens, context - len(ids))

    @torch.inference_mode()
    def write(
        self, encoded: list[list[int]], room: int, conditions: Sequence[Condition]
    ) -> tuple[list[tuple[float, ...] | None], list[tuple[Answer, ...]]]:
        """Return the prior and the answers of each prompt of a batch."""
        longest = max(map(len, encoded))
        tokens = torch.tensor([[self._pad] * (longest - len(ids)) + ids for ids in encoded], device=self._device)
        lengths = torch.tensor([len(ids) for ids in encoded], device=self._device)
        mask = (torch.arange(longest, device=self._device) >= longest - lengths[:, None]).long()
        prior, states = self._opened.prior, None
        shares: list[tuple[float, ...] | None] = [None] * len(encoded)
        if prior is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            states = self._opened.policy.states(tokens, mask, None, positions)[:, -1]
            if (log_prior := prior.log_prior(states)) is not None:
                shares = [tuple(row) for row in log_prior.exp().tolist()]
        by_condition = []
        for condition in conditions:
            z = None if states is None else self._latents(states, condition, encoded)
            by_condition.append([self._answer(condition, row) for row in self._decode(tokens, mask, z, room, encoded)])
        return shares, list(zip(*by_condition, strict=True))

    def _latents(self, states: Tensor, condition: Condition, encoded: list[list[int]]) -> Tensor:
        """Return z (B, d). A sampled row has its own seed."""
        assert self._opened.prior is not None
        weights = None if condition.code_weights is None else torch.tensor(condition.code_weights, device=self._device)
        rows = []
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            for state, ids in zip(states, encoded, strict=True):
                seed_draws(derive("prior", self._decoding.seed, *ids), self._device)
                rows.append(self._opened.prior(state[None], condition.prior_mode, weights))
        return torch.cat(rows)

    def _decode(
        self, tokens: Tensor, mask: Tensor, z: Tensor | None, room: int, encoded: list[list[int]]
    ) -> list[list[int]]:
        """Return the new tokens of each row, including the end token and padding after it."""
        decoding, draws = self._decoding, LogitsProcessorList()
        if decoding.temperature:
            draws.append(TemperatureLogitsWarper(decoding.temperature))
            if decoding.top_p < 1:  # CUDA has no deterministic kernel for its cumulative sum
                draws.append(TopPLogitsWarper(decoding.top_p))
            draws.append(_GumbelNoise([derive("tokens", decoding.seed, *ids) for ids in encoded]))
        model: Any = self._opened.causal_lm
        with default_generation(model), finite_masks(model):
            found = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=room,
                    num_beams=decoding.num_beams,
                    do_sample=False,
                    eos_token_id=self._ends,
                    pad_token_id=self._pad,
                ),
                logits_processor=draws,
                **({} if z is None else {"z": z}),
            )
        new: list[list[int]] = found[:, tokens.shape[1] :].tolist()
        return new

    def _answer(self, condition: Condition, new: list[int]) -> Answer:
        end = next((place for place, token in enumerate(new) if token in self._ends), None)
        text = self._opened.tokenizer.decode(new[:end], skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(condition.name, text.strip(), len(new[:end]), end is not None)


@contextmanager
def default_generation(model: PreTrainedModel) -> Iterator[None]:
    """Replace the model's generation config within the block. Its values (a repetition penalty, ...) have no effect."""
    published, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = published


class _GumbelNoise(LogitsProcessor):
    """Gumbel noise: the largest score becomes a draw from softmax(scores). Each row has its own generator.

    transformers draws all rows from one generator, so that a row's draws would depend on the other rows.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add noise to scores (B, V)."""
        exact = torch.float64
        waits = [torch.empty(scores.shape[1], dtype=exact).exponential_(generator=own) for own in self._generators]
        # On a CPU, the logarithm took a fifth of the time. Its last bit of float64 may differ between devices, whose
        # scores differ by much more.
        return scores.to(exact) - torch.stack(waits).to(scores.device).log()
