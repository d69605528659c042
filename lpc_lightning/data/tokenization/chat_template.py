"""Template that uses the chat template of the tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import jinja2
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import BadRow, DataError
from lpc_lightning.data.tokenization.template import AnswerFrame, Template
from lpc_lightning.data.tokenization.text_encoder import any_of, eos_id, name_of, special_texts
from lpc_lightning.types import Message

log = logging.getLogger(__name__)

_PROBE = "probe of the answer"
_EDGE = "\n \n "


class ChatTemplate(Template):
    """Chat template of the tokenizer. The chat template itself writes the beginning-of-sequence token, if any.

    The constructor renders a probe conversation. The result shows the text that the template writes around an answer,
    and whether the template strips the answer. The end token is the first added token after the answer of the probe,
    or the eos token if no added token follows.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        DataError: The tokenizer has no chat template or no end token, or the template does not render the probe.
    """

    kind = "chat"

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {name_of(tokenizer)} has no chat template. Use the plain template, or the tokenizer of "
                "a chat model."
            )
        self.tokenizer = tokenizer
        user = Message(role="user", content="question")
        try:
            prompt = self._apply([user], generate=True)
            whole = self._apply([user, Message(role="assistant", content=_PROBE)])
            spaced = self._apply([user, Message(role="assistant", content=f"{_EDGE}{_PROBE}{_EDGE[::-1]}")])
        except jinja2.TemplateError as error:
            raise DataError(
                f"The chat template of {name_of(tokenizer)} rejects a user turn followed by an assistant turn: "
                f"{error}. Use the plain template."
            ) from error
        head, separator, after = whole.rpartition(_PROBE)
        if not separator:
            raise DataError(
                f"The chat template of {name_of(tokenizer)} omits the text of an assistant turn. Use the plain "
                "template."
            )
        if not head.startswith(prompt):
            log.warning(
                "The chat template of %s ends a generation prompt with %r, but writes %r before the answer of an "
                "assistant turn. Answers are appended to the generation prompt.",
                name_of(tokenizer), prompt[-40:], head[-40:],
            )  # fmt: skip
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        end = re.search(any_of(added), after) if added else None
        frame = AnswerFrame(
            end_id=eos_id(tokenizer) if end is None else added[end[0]],
            before=head.removeprefix(prompt) if head.startswith(prompt) else "",
            after="" if end is None else after[: end.start()],
            strip_left=_stripped(spaced.partition(_PROBE)[0].removeprefix(head)),
            strip_right=_stripped(spaced.rpartition(_PROBE)[2].removesuffix(after)[::-1]),
        )
        markers = {text for text in added if len(text) > 1 and (text in prompt or text in after)}
        super().__init__(tokenizer, frame, markers | special_texts(tokenizer), lead_ids=[])

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


def _stripped(left: str) -> str | None:
    """Return the characters that were stripped, given the rest of `_EDGE`. None: all white space."""
    return {"": None, _EDGE.lstrip("\n"): "\n"}.get(left, "")
