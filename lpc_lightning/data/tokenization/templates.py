"""The templates by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.chat_template import ChatTemplate
from lpc_lightning.data.tokenization.plain_template import PlainTemplate
from lpc_lightning.data.tokenization.template import Template

TemplateKind = Literal["auto", "chat", "plain"]
"""`auto`: the tokenizer's chat template where it has one, else plain text."""

_KINDS: dict[str, Callable[[PreTrainedTokenizerBase], Template]] = {
    "auto": lambda tokenizer: ChatTemplate(tokenizer) if tokenizer.chat_template else PlainTemplate(tokenizer),
    "chat": ChatTemplate,
    "plain": PlainTemplate,
}


def make_template(tokenizer: PreTrainedTokenizerBase, kind: TemplateKind = "auto") -> Template:
    """The template of a kind.

    Raises:
        DataError: An unknown kind, `chat` without a chat template, or a tokenizer that cannot end an answer.
    """
    if kind not in _KINDS:
        raise DataError(f"template={kind!r}: expected one of {', '.join(_KINDS)}")
    return _KINDS[kind](tokenizer)
