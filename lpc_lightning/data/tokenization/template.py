"""What turns prompts and answers into token ids.

A completion is what the template writes around an answer, as ids, and then exactly one end-of-answer token. Text from
the data never becomes a control token: "<|im_end|>" in an answer is cut inside before it is encoded, so that it stays
text.
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
    """What a template writes around an answer."""

    end_id: int
    """The token that ends an answer."""
    before: str = ""
    """Text between the generation prompt and the answer, such as a space."""
    after: str = ""
    """Text between the answer and its end token."""
    strip_left: str | None = ""
    """Characters that the template strips from the start of an answer; None: all white space."""
    strip_right: str | None = ""
    """The same for its end."""


class _Prompt(NamedTuple):
    """An encoded prompt, and what of its text an answer is encoded together with."""

    ids: list[int]
    tail: str
    """The prompt's text from its last control token on: nothing before that can merge with an answer."""
    tail_ids: list[int]
    tail_continues: bool
    """The tail follows other text (it is what is left after a cut)."""


class Template(ABC):
    """Turns a `PreferenceExample` into a `TokenizedPair`.

    Attributes:
        kind: `chat` or `plain`.
        tokenizer: The tokenizer.
        frame: What stands around an answer, its end token included.
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
        """The prompt as text, up to where the answer begins.

        Raises:
            BadRow: The template refuses this conversation.
        """

    @property
    def end_id(self) -> int:
        """The token that ends every answer, and at which generation stops."""
        return self.frame.end_id

    @property
    def pad_id(self) -> int:
        """A token to pad with: the tokenizer's own, or the end token (padding is masked, so any token would do)."""
        pad: int | None = self.tokenizer.pad_token_id
        return self.end_id if pad is None else pad

    @property
    def bos_id(self) -> int | None:
        """The tokenizer's beginning-of-sequence token, if it has one."""
        bos: int | None = self.tokenizer.bos_token_id
        return bos

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides which ids come out: tokenizer, chat template, kind and frame."""
        tokens = self.tokenizer.special_tokens_map
        parts = [self.kind, asdict(self.frame), self._lead_ids, self.tokenizer.chat_template, tokens, self._backend()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """The prompt as ids, from its own text alone: the same in training and when text is generated.

        Raises:
            BadRow: The template refuses this conversation.
        """
        return self._encode_prompt(prompt).ids

    def tokenize(self, example: PreferenceExample) -> TokenizedPair:
        """Both sequences of a pair: `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

        Raises:
            BadRow: The template refuses the prompt, an answer is empty, or both answers have the same ids.
        """
        prompt = self._encode_prompt(example.prompt)
        chosen, rejected = (self._completion(prompt, answer) for answer in (example.chosen, example.rejected))
        if chosen == rejected:
            raise BadRow("equal answers", f"both become the same {len(chosen)} tokens: {example.chosen[:40]!r}")
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
            raise BadRow("empty answer", f"the tokenizer leaves nothing of {answer[:40]!r}")
        if self.end_id in ids:
            found = f"the tokenizer makes its end-of-answer token (id {self.end_id}) of text in {answer[:40]!r}"
            raise BadRow("end token in answer", found)
        return [*ids, self.end_id]

    def _framed(self, prompt: _Prompt, answer: str) -> list[int]:
        """Ids of the answer and the text around it, without the end token."""
        first, *rest = self._text.cut(answer)
        first = self.frame.before + first
        if rest:
            rest[-1] += self.frame.after
        else:
            first += self.frame.after
        joint = self._text.encoded(prompt.tail + first, prompt.tail_continues)
        cut = len(prompt.tail_ids)
        # Where a token spans the boundary, the prompt's ids must stay as they are at inference.
        ids = joint[cut:] if joint[:cut] == prompt.tail_ids else self._text.continued(first)
        for chunk in rest:
            ids = ids + self._text.continued(chunk)
        return ids

    def _backend(self) -> object:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        # Any earlier call may have left its own padding and truncation in the backend.
        return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
