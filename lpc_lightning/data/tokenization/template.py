"""Base class of the templates, which convert prompts and answers to token ids.

A completion is the answer with the text that the template writes around it, followed by exactly one end-of-answer
token. Text from the data never becomes a control token. For example, "<|im_end|>" in an answer is split into two parts,
which are encoded separately and so remain text.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.data.tokenization.system_turns import SystemTurns, treat_system_turns
from lpc_lightning.data.tokenization.text_encoder import TextEncoder
from lpc_lightning.types import Message, PreferenceExample, TokenizedPair, token_hash

RENDERED = "text that the template seems to have rendered already, encoded as plain text"
SPLIT_CONTROL = "control tokens in a text, encoded as plain text"

Note = Callable[[str], None]
"""Callback with the description of a change to a text."""


def no_note(description: str) -> None:
    """Do nothing with a description."""


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

    def around(self, answer: str) -> str:
        """Return the text of a completion: the stripped answer, and the text around it."""
        return self.before + answer.lstrip(self.strip_left).rstrip(self.strip_right) + self.after


class TurnMarks(NamedTuple):
    """Text that a template writes around turns. In the data, it shows that a text is already rendered."""

    user: str
    """Text in front of a user turn."""
    answer: str
    """Text between a user turn and the answer."""
    end: str
    """Text of the end-of-answer token."""


class _Prompt(NamedTuple):
    """Encoded prompt, with the part of its text that is encoded together with an answer."""

    ids: list[int]
    turns: list[Message]
    """Turns as the template gets them, with `mark` at the splits."""
    rendered: str
    """Rendered text of the prompt, with `mark` at the splits."""
    mark: str
    """Character that marks the splits in control tokens."""
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
        system_turns: Treatment of system turns: `keep`, `fold` or `drop`.
    """

    kind: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        frame: AnswerFrame,
        control: Collection[str],
        lead_ids: list[int],
        marks: TurnMarks,
        system_turns: SystemTurns,
    ) -> None:
        self.tokenizer = tokenizer
        self.frame = frame
        self.system_turns = system_turns
        self._lead_ids = lead_ids
        self._text = TextEncoder(tokenizer, control)
        self._marks = marks

    @abstractmethod
    def render(self, prompt: Sequence[Message], note: Note = no_note) -> str:
        """Render the prompt as text, up to the start of the answer.

        Args:
            prompt: The turns. System turns are rendered as they are.
            note: Called with a description if the text of a turn is changed.

        Raises:
            BadRow: The template rejects this conversation.
        """

    def render_answer(self, prompt: Sequence[Message], rendered: str, answer: str, note: Note = no_note) -> str:
        """Render an answer as the text between the rendered prompt and the end-of-answer token.

        Args:
            prompt: The turns in front of the answer.
            rendered: Result of `render` for these turns.
            answer: The answer.
            note: Called with a description if the text is changed.

        Raises:
            BadRow: The template cannot render this answer.
        """
        return self.frame.around(answer)

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

    @property
    def arguments(self) -> dict[str, object]:
        """Arguments of the chat template."""
        return {}

    @property
    def day(self) -> str:
        """Day that the template sees as today, "" if it does not read the date."""
        return ""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the token ids: tokenizer, chat template, settings and frame."""
        tokens = self.tokenizer.special_tokens_map
        settings = [self.kind, self.arguments, self.system_turns, self.day]
        parts = [settings, asdict(self.frame), self._lead_ids, self.tokenizer.chat_template, tokens, self._backend()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def prompt_ids(self, prompt: Sequence[Message], note: Note = no_note) -> list[int]:
        """Encode the prompt independently of any answer. The ids are the same in training and in generation.

        Args:
            prompt: The turns.
            note: Called with the description of each change to the texts.

        Raises:
            BadRow: The template rejects this conversation.
        """
        return self._encode_prompt(prompt, note=note).ids

    def tokenize(self, example: PreferenceExample, note: Note = no_note) -> TokenizedPair:
        """Encode both sequences of a pair: `prompt_ids + chosen_ids` and `prompt_ids + rejected_ids`.

        Args:
            example: The pair.
            note: Called with the description of each change to the texts.

        Raises:
            BadRow: The template rejects the prompt or an answer, an answer is empty, or both answers have the same ids.
        """
        answers = (example.chosen, example.rejected)
        if self._is_rendered(example):
            note(RENDERED)
        prompt = self._encode_prompt(example.prompt, answers, note)
        chosen, rejected = (self._completion(prompt, answer, note) for answer in answers)
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
            has_gold=example.has_gold,
            weight=example.weight,
            margin=example.margin,
            question=token_hash(array("q", self.prompt_ids(example.question)).tobytes()) if example.question else "",
        )

    def _encode_prompt(self, prompt: Sequence[Message], answers: Sequence[str] = (), note: Note = no_note) -> _Prompt:
        treated, change = treat_system_turns(prompt, self.system_turns)
        if change:
            note(change)
        mark = self._text.free_mark([*(turn["content"] for turn in treated), *answers])
        turns = [Message(role=turn["role"], content=self._split(turn["content"], mark, note)) for turn in treated]
        rendered = self.render(turns, note)
        first, *rest = rendered.split(mark)
        ids = self._lead_ids + self._text.ids(first)
        for chunk in rest:
            ids = ids + self._text.continued(chunk)
        last = rest[-1] if rest else first
        if not ids or not last:
            raise BadRow("empty prompt", f"the {self.kind} template renders it as {rendered!r}")
        tail = last[self._text.last_control(last) :]
        continues = bool(rest) and len(tail) == len(last)
        return _Prompt(ids, turns, rendered, mark, tail, self._text.encoded(tail, continues), continues)

    def _split(self, text: str, mark: str, note: Note) -> str:
        """Return a text with a mark in each control token."""
        pieces = self._text.cut(text)
        if len(pieces) > 1:
            note(SPLIT_CONTROL)
        return mark.join(pieces)

    def _completion(self, prompt: _Prompt, answer: str, note: Note) -> list[int]:
        if not answer.strip():
            raise BadRow("empty answer", f"the answer is {answer!r}")
        split = self._split(answer, prompt.mark, note)
        ids = self._continued(prompt, self.render_answer(prompt.turns, prompt.rendered, split, note))
        empty = self.frame.around("")
        if len(ids) <= len(empty) and ids == self._continued(prompt, empty):
            raise BadRow("empty answer", f"the tokenizer returns no token for {answer[:40]!r}")
        if self.end_id in ids:
            detail = f"the tokenizer encodes text in {answer[:40]!r} as its end-of-answer token (id {self.end_id})"
            raise BadRow("end token in answer", detail)
        return [*ids, self.end_id]

    def _continued(self, prompt: _Prompt, text: str) -> list[int]:
        """Encode the text behind a prompt, without the end token."""
        first, *rest = text.split(prompt.mark)
        joint = self._text.encoded(prompt.tail + first, prompt.tail_continues)
        cut = len(prompt.tail_ids)
        # If a token spans the boundary, the answer is encoded separately. The prompt must have the ids that it has at
        # inference.
        ids = joint[cut:] if joint[:cut] == prompt.tail_ids else self._text.continued(first)
        for chunk in rest:
            ids = ids + self._text.continued(chunk)
        return ids

    def _is_rendered(self, example: PreferenceExample) -> bool:
        """Return True if a text of the data has the marks that this template writes itself."""
        user, answer, end = self._marks
        has_control = len(self._text.cut(user)) > 1
        bos = str(self.tokenizer.bos_token or "")
        for turn in example.prompt:
            text = turn["content"].strip()
            if not user.startswith(bos):
                text = text.removeprefix(bos).strip()
            if (
                user
                and answer
                and answer in text.partition(user)[2]
                and (has_control or (text.startswith(user) and text.endswith(answer)))
            ):
                return True
        return bool(end) and any(text.rstrip().endswith(end) for text in (example.chosen, example.rejected))

    def _backend(self) -> object:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())]
        # Padding and truncation are left out: they are settings of the last call of the tokenizer.
        return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
