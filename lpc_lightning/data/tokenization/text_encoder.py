"""Text from the data to token ids, without its ever becoming a control token."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.types import Message


class TextEncoder:
    """Text to ids, with ways to go on in the middle of a text and to keep control tokens out.

    Args:
        tokenizer: The tokenizer.
        control: Texts of the tokens that text from the data must never become.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Collection[str]) -> None:
        self._tokenizer = tokenizer
        self._control = re.compile(any_of(control) if control else r"(?!)")
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


def any_of(texts: Collection[str]) -> str:
    """A pattern that matches any of the texts, the longest first."""
    return "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text)))


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts of the special tokens. One of a single character cannot be cut, and blanks are in every text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in added | set(tokenizer.all_special_tokens) if len(text) > 1 and text.strip()}


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's eos token.

    Raises:
        DataError: It has none.
    """
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"The tokenizer {name_of(tokenizer)} has no token that ends an answer: its template writes none after an "
            "answer and it has no eos token. Set one (`tokenizer.eos_token = ...`, a token of its vocabulary) and save "
            "it again."
        )
    return eos


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to call a tokenizer in an error."""
    return str(tokenizer.name_or_path) or type(tokenizer).__name__
