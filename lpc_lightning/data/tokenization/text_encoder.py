"""Encoder of text from the data, which never becomes a control token."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import DataError

LATEST = 256
"""Number of texts whose ids are kept. Pairs of one prompt are near each other in a file."""
LONGEST = 4000
"""Characters of the longest text whose ids are kept. The ids of longer ones would fill the memory."""


class TextEncoder:
    """Encoder of text that can also encode the continuation of a text, and that can split control tokens.

    Args:
        tokenizer: The tokenizer.
        control: Texts of the control tokens. Text from the data must never be encoded as one of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Collection[str]) -> None:
        self._tokenizer = tokenizer
        self._control = re.compile(any_of(control) if control else r"(?!)")
        # Pairs share prompts, and all answers the text before them.
        self._ids = lru_cache(LATEST)(self._encode)
        # SentencePiece adds a space at the start of a text. To encode a continuation without it, the text is encoded
        # after one of these openers, and the ids of the opener are removed.
        self._openers = [(opener, self.ids(opener)) for opener in "\n~。"]
        self._adds_space = self._behind_opener("a") not in (None, self.ids("a"))

    def ids(self, text: str) -> list[int]:
        """Encode a text from its start. Control tokens in it are encoded as control tokens."""
        return list(self._ids(text) if len(text) <= LONGEST else self._encode(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def continued(self, text: str) -> list[int]:
        """Encode a continuation of a text, without the space that some tokenizers add at the start."""
        behind = self._behind_opener(text) if self._adds_space else None
        return self.ids(text) if behind is None else behind

    def encoded(self, text: str, continues: bool) -> list[int]:
        """Encode a text by `continued` if it continues another text, and by `ids` otherwise."""
        return self.continued(text) if continues else self.ids(text)

    def cut(self, text: str) -> list[str]:
        """Split a text into pieces without control tokens. Each control token is split after its first character."""
        pieces, start = [], 0
        while match := self._control.search(text, start):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        return [*pieces, text[start:]]

    def last_control(self, text: str) -> int:
        """Return the start of the last control token in a text, or 0 if it has none."""
        return max((match.start() for match in self._control.finditer(text)), default=0)

    def free_mark(self, texts: Sequence[str]) -> str:
        """Return a private use character that no text contains. It marks the splits in the rendered text."""
        return next(mark for mark in map(chr, range(0xF0000, 0xFFFFE)) if not any(mark in text for text in texts))

    def _behind_opener(self, text: str) -> list[int] | None:
        for opener, opener_ids in self._openers:
            ids = self.ids(opener + text)
            if ids[: len(opener_ids)] == opener_ids:
                return ids[len(opener_ids) :]
        return None


def any_of(texts: Collection[str]) -> str:
    """Return a pattern that matches any of the texts, the longest first."""
    return "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text)))


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the texts of the special tokens.

    Single characters are left out because they cannot be split, and white space because every text contains it.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {text for text in added | set(tokenizer.all_special_tokens) if len(text) > 1 and text.strip()}


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the eos token of the tokenizer.

    Raises:
        DataError: The tokenizer has no eos token.
    """
    eos: int | None = tokenizer.eos_token_id
    if eos is None:
        raise DataError(
            f"The tokenizer {name_of(tokenizer)} has no token that ends an answer: its template writes none after an "
            "answer, and it has no eos token. Set `tokenizer.eos_token` to a token of its vocabulary, and save the "
            "tokenizer."
        )
    return eos


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a tokenizer for error messages."""
    return str(tokenizer.name_or_path) or type(tokenizer).__name__
