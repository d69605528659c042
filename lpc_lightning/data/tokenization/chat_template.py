"""Template that uses the chat template of the tokenizer."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cache
from itertools import takewhile
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.sources.rows import BadRow, DataError
from lpc_lightning.data.tokenization.system_turns import SystemTurns
from lpc_lightning.data.tokenization.template import AnswerFrame, Note, Template, TurnMarks, no_note
from lpc_lightning.data.tokenization.text_encoder import any_of, eos_id, name_of, special_texts
from lpc_lightning.data.tokenization.think_blocks import check_one_block, continue_block, is_think_tag
from lpc_lightning.types import Message

log = logging.getLogger(__name__)

CHANGED_TURN = "turn that the chat template does not render word for word"
CHANGED_ANSWER = "answer that the chat template does not render word for word, used as it is"

DAY = datetime(2024, 7, 26)
"""Day that a template sees as today. It is the one that Llama 3.2's template writes where there is no clock."""
CLOCK = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""Call of the function of chat templates that formats the current time."""

_QUESTION = "probe of the question"
_PROBE = "probe of the answer"
_EDGE = "\n \n "


class ChatTemplate(Template):
    """Chat template of the tokenizer. The chat template itself writes the beginning-of-sequence token, if any.

    A completion is what the chat template renders behind the generation prompt for a conversation that ends in the
    answer. If the template does not render the answer there word for word, the answer is appended to the generation
    prompt, which happens with templates that remove reasoning from every answer.

    A template without generation prompts gets one: the text that it writes between a user turn and an answer. Otherwise
    an answer would begin with the header of its turn, in training and in generation.

    A template that writes today's date gets the same day at all times (`DAY`), so that tokens do not depend on the day.

    The constructor renders probe conversations. The results show the text that the template writes around an answer,
    whether it strips the answer, and whether it renders system turns. The end token is the first added token after the
    answer of the probe, or the eos token if no added token follows.

    Args:
        tokenizer: A tokenizer with a chat template.
        arguments: Arguments of the chat template, such as `enable_thinking`.
        system_turns: Treatment of system turns.

    Raises:
        DataError: The tokenizer has no chat template or no end token, the template does not render the probe, or it has
            no such argument.
    """

    kind = "chat"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        system_turns: SystemTurns = "auto",
    ) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer {name_of(tokenizer)} has no chat template. Use the plain template, or the tokenizer of "
                "a chat model."
            )
        self.tokenizer = tokenizer
        self._arguments = dict(arguments or {})
        # transformers passes no functions to a template, so that the calls are replaced by their result.
        # A tokenizer may have several templates, of which one is for tools.
        template = tokenizer.get_chat_template(tools=self._arguments.get("tools"))
        self._dated = CLOCK.sub(lambda call: repr(DAY.strftime(call[2])), template)
        self._has_day = self._dated != template
        if self._has_day:
            _report_day(name_of(tokenizer))
        _check_arguments(self._arguments, template, tokenizer)
        user = Message(role="user", content=_QUESTION)
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
        self.published = template
        """Jinja source for an export: that of the tokenizer, with a generation prompt."""
        header = head.removeprefix(prompt).rstrip(" ") if head.startswith(prompt) else ""
        if header.strip() and "add_generation_prompt" not in template:
            _report_header(name_of(tokenizer), header)
            self.published, self._dated = (_with_prompt(each, header) for each in (template, self._dated))
            prompt += header
        if not head.startswith(prompt):
            _report_other_end(name_of(tokenizer), prompt[-40:], head[-40:])
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
        end = re.search(any_of(added), after) if added else None
        frame = AnswerFrame(
            end_id=eos_id(tokenizer) if end is None else added[end[0]],
            before=head.removeprefix(prompt) if head.startswith(prompt) else "",
            after="" if end is None else after[: end.start()],
            strip_left=_stripped(spaced.partition(_PROBE)[0].removeprefix(head)),
            strip_right=_stripped(spaced.rpartition(_PROBE)[2].removesuffix(after)[::-1]),
        )
        self._after = after
        markers = {text for text in added if len(text) > 1 and (text in prompt or text in after)}
        control = {text for text in markers | special_texts(tokenizer) if not is_think_tag(text)}
        if system_turns == "auto":
            system_turns = "keep" if self._renders_system_turns() else "fold"
        marks = _turn_marks(tokenizer, prompt, head, str(tokenizer.eos_token) if end is None else end[0], control)
        super().__init__(tokenizer, frame, control, [], marks, system_turns)

    @property
    def day(self) -> str:
        """See `Template.day`."""
        return DAY.date().isoformat() if self._has_day else ""

    @property
    def arguments(self) -> dict[str, object]:
        """See `Template.arguments`."""
        return self._arguments

    @property
    def source(self) -> str:
        """Jinja source of the chat template, in which today's date is fixed."""
        return self._dated

    def render(self, prompt: Sequence[Message], note: Note = no_note) -> str:
        """See `Template.render`.

        Raises:
            BadRow: The template refuses the turns or leaves one out.
        """
        try:
            rendered = self._apply(prompt, generate=True)
            for place, turn in enumerate(prompt):
                if turn["role"] == "system" or turn["content"].strip() not in rendered:
                    self._check_turn(prompt, place, rendered, note)
        except jinja2.TemplateError as error:
            has_system = any(turn["role"] == "system" for turn in prompt)
            advice = "; data.system_turns: fold puts a system turn in front of the user turn" if has_system else ""
            raise BadRow("refused by the chat template", f"{error}{advice}") from error
        return rendered

    def render_answer(self, prompt: Sequence[Message], rendered: str, answer: str, note: Note = no_note) -> str:
        """See `Template.render_answer`."""
        completion = self._rendered_answer(prompt, rendered, answer)
        if completion is None:
            completion = self.frame.around(continue_block(rendered, answer, note))
            if self._renders_after(prompt, rendered):
                note(CHANGED_ANSWER)
        check_one_block(rendered, completion, answer)
        return completion

    def _rendered_answer(self, prompt: Sequence[Message], rendered: str, answer: str) -> str | None:
        """Return the answer as the template renders it. None if it is not rendered behind the prompt word for word."""
        try:
            whole = self._apply([*prompt, Message(role="assistant", content=answer)])
        except jinja2.TemplateError as error:
            raise BadRow("refused by the chat template", str(error)) from error
        if not (whole.startswith(rendered) and whole.endswith(self._after)):
            return None
        completion = whole[len(rendered) :].removesuffix(self._after)
        return completion + self.frame.after if _squeezed(answer) in _squeezed(completion) else None

    def _renders_after(self, prompt: Sequence[Message], rendered: str) -> bool:
        """Return True if the template renders answers behind the generation prompt."""
        return self._apply([*prompt, Message(role="assistant", content=_PROBE)]).startswith(rendered)

    def _check_turn(self, prompt: Sequence[Message], place: int, rendered: str, note: Note) -> None:
        """Compare the rendered prompt with that of another text in one turn.

        Raises:
            BadRow: They are equal, so that the text of the turn is lost.
        """
        turn = prompt[place]
        other = [*prompt[:place], Message(role=turn["role"], content=_PROBE), *prompt[place + 1 :]]
        if turn["content"].strip() and self._apply(other, generate=True) == rendered:
            advice = "data.system_turns to fold or drop" if turn["role"] == "system" else "data.template to plain"
            raise BadRow(
                "left out by the chat template",
                f"the text of turn {place + 1} ({turn['role']}) is not in the rendered prompt; set {advice}",
            )
        if turn["content"].strip() not in rendered:
            note(CHANGED_TURN)

    def _renders_system_turns(self) -> bool:
        turns = [Message(role="system", content=_PROBE), Message(role="user", content=_QUESTION)]
        try:
            return _PROBE in self._apply(turns, generate=True)
        except jinja2.TemplateError:
            return False

    def _apply(self, messages: Sequence[Message], generate: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            [{"role": turn["role"], "content": turn["content"]} for turn in messages],
            tokenize=False,
            add_generation_prompt=generate,
            chat_template=self._dated,
            **self._arguments,
        )
        assert isinstance(text, str)
        return text


@cache
def _report_day(name: str) -> None:
    """Log once that the day is fixed."""
    log.warning(
        "The chat template of %s can write today's date. Tokens must not change from day to day, so it sees %s as "
        "today, in training, evaluation and generation. To set another text, use data.template_kwargs if the template "
        "has an argument for it, such as date_string.",
        name, f"{DAY:%d %b %Y}",
    )  # fmt: skip


@cache
def _report_header(name: str, header: str) -> None:
    """Log once that a template has no generation prompt."""
    log.warning(
        "The chat template of %s does not read add_generation_prompt. A prompt ends with %r, which the template writes "
        "before an answer, in training, evaluation and generation. An export has a template that does this.",
        name, header,
    )  # fmt: skip


def _with_prompt(template: str, header: str) -> str:
    """Return a template that ends with a header where a generation prompt is wanted."""
    return f"{template.removesuffix(chr(10))}{{% if add_generation_prompt %}}{{{{ {header!r} }}}}{{% endif %}}"


@cache
def _report_other_end(name: str, prompt: str, head: str) -> None:
    """Log once that a generation prompt is not what stands in front of an answer."""
    log.warning(
        "The chat template of %s ends a generation prompt with %r, but writes %r before the answer of an assistant "
        "turn. Answers are appended to the generation prompt. A think block that it opens is closed before an answer "
        "without one. If the template has an argument for it, set data.template_kwargs.",
        name, prompt, head,
    )  # fmt: skip


def _check_arguments(arguments: Mapping[str, Any], template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    for name in arguments:
        if name in reserved or name == "messages":
            raise DataError(f"data.template_kwargs: found {name}, which the suite sets itself. Remove it.")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise DataError(
                f"data.template_kwargs: found {name}, which the chat template of {name_of(tokenizer)} does not read; "
                "expected arguments of this template, such as enable_thinking in that of Qwen3."
            )


def _turn_marks(
    tokenizer: PreTrainedTokenizerBase, prompt: str, head: str, end: str, control: Collection[str]
) -> TurnMarks:
    """Return the text around the turns of the probe.

    Args:
        tokenizer: The tokenizer.
        prompt: Generation prompt of the probe.
        head: Text in front of the answer of the probe, in a whole conversation.
        end: Text of the end token.
        control: Texts of the control tokens.
    """
    before_user, _, after_user = prompt.partition(_QUESTION)
    if tokenizer.bos_token and head.count(str(tokenizer.bos_token)) == 1:
        before_user = before_user.removeprefix(str(tokenizer.bos_token))
    last = max((match.start() for match in re.finditer(any_of(control), before_user)), default=0) if control else 0
    both = zip(after_user, head.partition(_QUESTION)[2], strict=False)
    before_answer = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], both))
    return TurnMarks(before_user[last:].strip(), before_answer.strip(), end if len(end) > 1 else "")


def _squeezed(text: str) -> str:
    """Return a text without its white space. A template may change white space around reasoning."""
    return "".join(text.split())


def _stripped(left: str) -> str | None:
    """Return the characters that were stripped, given the rest of `_EDGE`. None: all white space."""
    return {"": None, _EDGE.lstrip("\n"): "\n"}.get(left, "")
