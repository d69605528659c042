"""Base class of the templates, which convert prompts and answers to token ids.

A completion is the answer with the text that the template writes around it, followed by exactly one end-of-answer
token. Text from the data never becomes a control token. For example, "<|im_end|>" in an answer is split into two parts,
which are encoded separately and so remain text.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.data.tokenization.text_encoder import TextEncoder
from lpc_lightning.types import Message, PreferenceExample, TokenizedPair


@dataclass(frozen=True)
class AnswerFrame:
    """Text and tokens that a template writes around an answer."""

    end_id: int
    """Token that ends an answer."""
    before: str = ""
    """Text between the generation prompt and the answer, such as a space."""
    after: str = ""
    """Text between the answer and its end token."""
    strip_left: str | None = ""
    """Characters that the template strips from the start of an answer. None: all white space."""
    strip_right: str | None = ""
    """Characters that the template strips from the end of an answer. None: all white space."""


class _Prompt(NamedTuple):
    """Encoded prompt, with the part of its text that is encoded together with an answer."""

    ids: list[int]
    tail: str
    """Text of the prompt from its last control token on. No earlier text can merge with an answer."""
    tail_ids: list[int]
    tail_continues: bool
    """True if the tail follows other text, which is the case after a split."""


class Template(ABC):
    """Converter of a `PreferenceExample` to a `TokenizedPair`.

    Attributes:
        kind: `chat` or `plain`.
        tokenizer: The tokenizer.
        frame: Text around an answer, and its end token.
    """

    kind: str

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, frame: AnswerFrame, control: Collection[str], lead_ids: list[int]
    ) -> None:
        self.tokenizer = tokenizer
        self.frame = frame
        self._lead_ids = lead_ids
        self._text = TextEncoder(tokenizer, control)

    @abstractmethod
    def render(self, prompt: Sequence[Message]) -> str:
        """Render the prompt as text, up to the start of the answer.

        Raises:
            BadRow: The template rejects this conversation.
        """

    @property
    def end_id(self) -> int:
        """Token that ends every answer. Generation stops at it."""
        return self.frame.end_id

    @property
    def pad_id(self) -> int:
        """Padding token of the tokenizer, or the end token if it has none. Padding is masked, so any token is valid."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.end_id if pad is None else pad

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence token of the tokenizer, or None if it has none."""
        bos: int | None = self.tokenizer.bos_token_id
        return bos

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the token ids: tokenizer, chat template, kind and frame."""
        tokens = self.tokenizer.special_tokens_map
        parts = [self.kind, asdict(self.frame), self._lead_ids, self.tokenizer.chat_template, tokens, self._backend()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Encode the prompt independently of any answer. The ids are the same in training and in generation.

        Raises:
            BadRow: The template rejects this conversation.
        """
        return self._encode_prompt(prompt).ids

    def tokenize(self, example: PreferenceExample) -> TokenizedPair:
        """Encode both sequences of a pair: `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

        Raises:
            BadRow: The template rejects the prompt, an answer is empty, or both answers have the same ids.
        """
        prompt = self._encode_prompt(example.prompt)
        chosen, rejected = (self._completion(prompt, answer) for answer in (example.chosen, example.rejected))
        if chosen == rejected:
            raise BadRow("equal answers", f"both are encoded as the same {len(chosen)} tokens: {example.chosen[:40]!r}")
        return TokenizedPair(
            id=example.id,
            prompt_ids=prompt.ids,
            chosen_ids=chosen,
            rejected_ids=rejected,
            source=example.source,
            factor=example.factor,
            annotator=example.annotator,
            flipped=example.flipped,
        )

    def _encode_prompt(self, prompt: Sequence[Message]) -> _Prompt:
        pieces = [self._text.cut(turn["content"]) for turn in prompt]
        mark = self._text.free_mark(prompt) if any(len(cut) > 1 for cut in pieces) else None
        rendered = self.render(
            [
                Message(role=turn["role"], content=(mark or "").join(cut))
                for turn, cut in zip(prompt, pieces, strict=True)
            ]
        )
        first, *rest = rendered.split(mark) if mark else [rendered]
        ids = self._lead_ids + self._text.ids(first)
        for chunk in rest:
            ids = ids + self._text.continued(chunk)
        last = rest[-1] if rest else first
        if not ids or not last:
            raise BadRow("empty prompt", f"the {self.kind} template renders it as {rendered!r}")
        tail = last[self._text.last_control(last) :]
        continues = bool(rest) and len(tail) == len(last)
        return _Prompt(ids, tail, self._text.encoded(tail, continues), continues)

    def _completion(self, prompt: _Prompt, answer: str) -> list[int]:
        if not answer.strip():
            raise BadRow("empty answer", f"the answer is {answer!r}")
        answer = answer.lstrip(self.frame.strip_left).rstrip(self.frame.strip_right)
        ids = self._framed(prompt, answer)
        if len(ids) <= len(self.frame.before + self.frame.after) and ids == self._framed(prompt, ""):
            raise BadRow("empty answer", f"the tokenizer returns no token for {answer[:40]!r}")
        if self.end_id in ids:
            detail = f"the tokenizer encodes text in {answer[:40]!r} as its end-of-answer token (id {self.end_id})"
            raise BadRow("end token in answer", detail)
        return [*ids, self.end_id]

    def _framed(self, prompt: _Prompt, answer: str) -> list[int]:
        """Encode the answer and the text around it, without the end token."""
        first, *rest = self._text.cut(answer)
        first = self.frame.before + first
        if rest:
            rest[-1] += self.frame.after
        else:
            first += self.frame.after
        joint = self._text.encoded(prompt.tail + first, prompt.tail_continues)
        cut = len(prompt.tail_ids)
        # If a token spans the boundary, the answer is encoded separately. The prompt must have the ids that it has at
        # inference.
        ids = joint[cut:] if joint[:cut] == prompt.tail_ids else self._text.continued(first)
        for chunk in rest:
            ids = ids + self._text.continued(chunk)
        return ids

    def _backend(self) -> object:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        # Padding and truncation are left out: they are settings of the last call of the tokenizer.
        return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
