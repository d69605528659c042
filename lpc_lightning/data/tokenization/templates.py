"""Templates by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.chat_template import ChatTemplate
from lpc_lightning.data.tokenization.plain_template import PlainTemplate
from lpc_lightning.data.tokenization.template import Template

TemplateKind = Literal["auto", "chat", "plain"]
"""Kind of template. `auto`: `chat` if the tokenizer has a chat template, otherwise `plain`."""

_KINDS: dict[str, Callable[[PreTrainedTokenizerBase], Template]] = {
    "auto": lambda tokenizer: ChatTemplate(tokenizer) if tokenizer.chat_template else PlainTemplate(tokenizer),
    "chat": ChatTemplate,
    "plain": PlainTemplate,
}


def make_template(tokenizer: PreTrainedTokenizerBase, kind: TemplateKind = "auto") -> Template:
    """Make the template of a kind.

    Raises:
        DataError: The kind is unknown, it is `chat` and there is no chat template, or the tokenizer has no end token.
    """
    if kind not in _KINDS:
        raise DataError(f"template={kind!r}: expected one of {', '.join(_KINDS)}")
    return _KINDS[kind](tokenizer)
