"""Templates by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.chat_template import ChatTemplate
from lpc_lightning.data.tokenization.plain_template import PlainTemplate
from lpc_lightning.data.tokenization.system_turns import SystemTurns, check_treatment
from lpc_lightning.data.tokenization.template import Template

TemplateKind = Literal["auto", "chat", "plain"]
"""Kind of template. `auto`: `chat` if the tokenizer has a chat template, otherwise `plain`."""


class TemplateSettings(NamedTuple):
    """Settings of a template. They are the same in training, evaluation and generation."""

    kind: TemplateKind = "auto"
    """Kind of template."""
    arguments: Mapping[str, Any] | None = None
    """Arguments of the chat template, such as `{"enable_thinking": False}`."""
    system_turns: SystemTurns = "auto"
    """Treatment of system turns."""


def make_template(
    tokenizer: PreTrainedTokenizerBase,
    kind: TemplateKind = "auto",
    arguments: Mapping[str, Any] | None = None,
    system_turns: SystemTurns = "auto",
) -> Template:
    """Make the template of a kind. The parameters are those of `TemplateSettings`.

    Raises:
        DataError: A setting is unknown, the kind is `chat` and there is no chat template, there are arguments and the
            template is plain, or the tokenizer has no end token.
    """
    kinds = get_args(TemplateKind)
    if kind not in kinds:
        raise DataError(f"data.template: found {kind!r}, expected one of {', '.join(kinds)}.")
    check_treatment(system_turns)
    if kind == "chat" or (kind == "auto" and tokenizer.chat_template):
        return ChatTemplate(tokenizer, arguments, system_turns)
    if arguments:
        raise DataError(
            f"data.template_kwargs: found {', '.join(arguments)} for the plain template, which has no arguments; "
            "expected null. Remove them, or use a tokenizer with a chat template."
        )
    return PlainTemplate(tokenizer, system_turns)
