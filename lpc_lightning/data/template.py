"""Prompts and answers as token ids: through the tokenizer's chat template, or as plain text for base models.

A completion is what the template writes around an answer, as ids, and then exactly one end-of-answer token. Text from
the data never becomes a control token: "<|im_end|>" in an answer is cut inside before it is encoded, so that it stays
text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import jinja2
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.rows import BadRow, DataError
from lpc_lightning.types import Message, PreferenceExample, TokenizedPair

log = logging.getLogger(__name__)

TemplateKind = Literal["auto", "chat", "plain"]
"""`auto`: the tokenizer's chat template where it has one, else plain text."""


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
        self._text = _TextEncoder(tokenizer, control)

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


class ChatTemplate(Template):
    """The tokenizer's own chat template, which writes any beginning-of-sequence token itself.

    A probe conversation is rendered once to see what the template puts around an answer and whether it strips it. The
    end token is the first added token that follows the probe's answer, or the tokenizer's eos where none does.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        DataError: There is no chat template, it does not render the probe, or nothing ends an answer.
    """

    kind = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {_name(tokenizer)} has no chat template. Use the plain template, or a tokenizer of a "
                "chat model."
            )
        self.tokenizer = tokenizer
        user = Message(role="user", content="question")
        try:
            prompt = self._apply([user], generate=True)
            whole = self._apply([user, Message(role="assistant", content=_PROBE)])
            spaced = self._apply([user, Message(role="assistant", content=f"{_EDGE}{_PROBE}{_EDGE[::-1]}")])
        except jinja2.TemplateError as error:
            raise DataError(
                f"The chat template of {_name(tokenizer)} refuses a user and an assistant turn: {error}"
            ) from error
        head, found, after = whole.rpartition(_PROBE)
        if not found:
            raise DataError(f"The chat template of {_name(tokenizer)} leaves out the text of an assistant turn.")
        if not head.startswith(prompt):
            log.warning(
                "The chat template of %s opens an answer to generate with %r, but writes a given one after %r: answers "
                "are put right after the former.", _name(tokenizer), prompt[-40:], head[-40:],
            )  # fmt: skip
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        end = re.search(_any_of(added), after) if added else None
        frame = AnswerFrame(
            end_id=_eos(tokenizer) if end is None else added[end[0]],
            before=head.removeprefix(prompt) if head.startswith(prompt) else "",
            after="" if end is None else after[: end.start()],
            strip_left=_stripped(spaced.partition(_PROBE)[0].removeprefix(head)),
            strip_right=_stripped(spaced.rpartition(_PROBE)[2].removesuffix(after)[::-1]),
        )
        markers = {text for text in added if len(text) > 1 and (text in prompt or text in after)}
        super().__init__(tokenizer, frame, markers | _special(tokenizer), lead_ids=[])

    def render(self, prompt: Sequence[Message]) -> str:
        """See `Template.render`."""
        try:
            return self._apply(prompt, generate=True)
        except jinja2.TemplateError as error:
            raise BadRow("refused by the chat template", str(error)) from error

    def _apply(self, messages: Sequence[Message], generate: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            [{"role": turn["role"], "content": turn["content"]} for turn in messages],
            tokenize=False,
            add_generation_prompt=generate,
        )
        assert isinstance(text, str)
        return text


class PlainTemplate(Template):
    """A plain text for base models: "System: ...\\n\\nUser: ...\\n\\nAssistant:", the answer after one space, then eos.

    The beginning-of-sequence token stands before it exactly when the tokenizer by itself adds one.

    Args:
        tokenizer: Any tokenizer with an eos token.

    Raises:
        DataError: The tokenizer has no eos token.
    """

    kind = "plain"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        bare = tokenizer.encode("User", add_special_tokens=False)
        full = tokenizer.encode("User")
        lead = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        super().__init__(
            tokenizer, AnswerFrame(end_id=_eos(tokenizer), before=" "), _special(tokenizer), lead_ids=full[:lead]
        )

    def render(self, prompt: Sequence[Message]) -> str:
        """See `Template.render`."""
        return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in prompt) + "Assistant:"


def make_template(tokenizer: PreTrainedTokenizerBase, kind: TemplateKind = "auto") -> Template:
    """The template of a kind.

    Raises:
        DataError: An unknown kind, `chat` without a chat template, or a tokenizer that cannot end an answer.
    """
    if kind not in _KINDS:
        raise DataError(f"template={kind!r}: expected one of {', '.join(_KINDS)}")
    return _KINDS[kind](tokenizer)


_KINDS = {
    "auto": lambda tokenizer: (ChatTemplate if tokenizer.chat_template else PlainTemplate)(tokenizer),
    "chat": ChatTemplate,
    "plain": PlainTemplate,
}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot end an answer. A missing pad token is no fault: see `Template.pad_id`.

    Raises:
        DataError: It has no eos token, and no chat template whose answers end with a token.
    """
    make_template(tokenizer)


_PROBE = "probe of the answer"
_EDGE = "\n \n "


def _stripped(left: str) -> str | None:
    """What was stripped, seen from what is left of `_EDGE`."""
    return {"": None, _EDGE.lstrip("\n"): "\n"}.get(left, "")


class _TextEncoder:
    """Text to ids, with ways to go on in the middle of a text and to keep control tokens out.

    Args:
        tokenizer: The tokenizer.
        control: Texts of the tokens that text from the data must never become.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Collection[str]) -> None:
        self._tokenizer = tokenizer
        self._control = re.compile(_any_of(control) if control else r"(?!)")
        # SentencePiece puts a space before any text that begins. Text in the middle of another is encoded behind one of
        # these, whose own ids are then taken off.
        self._openers = [(opener, self.ids(opener)) for opener in "\n~。"]
        self._adds_space = self._behind_opener("a") not in (None, self.ids("a"))

    def ids(self, text: str) -> list[int]:
        """A text from its start. Control tokens in it are read as such."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def continued(self, text: str) -> list[int]:
        """A text as it is encoded in the middle of another one: without the space that some tokenizers put first."""
        behind = self._behind_opener(text) if self._adds_space else None
        return self.ids(text) if behind is None else behind

    def encoded(self, text: str, continues: bool) -> list[int]:
        """`continued` or `ids`."""
        return self.continued(text) if continues else self.ids(text)

    def cut(self, text: str) -> list[str]:
        """The text in pieces that hold no control token: each one is cut after its first character."""
        pieces, start = [], 0
        while match := self._control.search(text, start):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*pieces, text[start:]]

    def last_control(self, text: str) -> int:
        """Where the last control token of a text begins; 0 where it holds none."""
        return max((match.start() for match in self._control.finditer(text)), default=0)

    def free_mark(self, prompt: Sequence[Message]) -> str:
        """A character of the private use plane that no turn holds: it carries the cuts through the template."""
        used = set().union(*(turn["content"] for turn in prompt))
        return next(mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if mark not in used)

    def _behind_opener(self, text: str) -> list[int] | None:
        for opener, opener_ids in self._openers:
            ids = self.ids(opener + text)
            if ids[: len(opener_ids)] == opener_ids:
                return ids[len(opener_ids) :]
        return None


def _any_of(texts: Collection[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text)))


def _special(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts of the special tokens. One of a single character cannot be cut, and blanks are in every text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in added | set(tokenizer.all_special_tokens) if len(text) > 1 and text.strip()}


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"The tokenizer {_name(tokenizer)} has no token that ends an answer: its template writes none after an "
            "answer and it has no eos token. Set one (`tokenizer.eos_token = ...`, a token of its vocabulary) and save "
            "it again."
        )
    return eos


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.name_or_path) or type(tokenizer).__name__
