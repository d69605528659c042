"""Conversion of text that a chat template has rendered back to messages."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lpc_lightning.data.sources.messages import ROLES
from lpc_lightning.data.sources.rows import BadRow
from lpc_lightning.types import Message, PreferenceExample


@dataclass(frozen=True)
class Markup:
    """Headers and ends that a template writes around turns."""

    name: str
    """Name in reports."""
    header: re.Pattern[str]
    """Header of a turn. Its only group is the name of the role."""
    end: re.Pattern[str] | None = None
    """Token at the end of a turn. None: a turn ends at the next header."""
    later: str = ""
    """Header of a later turn, which the text must contain. A text that only begins with "Human:" is no dialogue."""
    first: str = ""
    """Header of the first turn, which a text with headers of later turns may lack."""

    @property
    def description(self) -> str:
        """Name of the form in reports."""
        return f"rendered text ({self.name})"

    @property
    def has_tokens(self) -> bool:
        """True if headers are control tokens, which ordinary text does not contain."""
        return self.end is not None

    def turns(self, text: str) -> tuple[Message, ...] | None:
        """Split a text into turns. Return None if it does not begin with a header, or has text between turns."""
        text = text.lstrip() if self.has_tokens else text
        if self.first and not self.header.match(text) and self.header.search(text):
            text = self.first + text
        return self.split(text) if self.later in text or text.startswith("\n\n") else None

    def split(self, text: str) -> tuple[Message, ...] | None:
        """Split a text that begins with a header into turns, also without a later one. Return None for other texts."""
        if not self.header.match(text):
            return None
        _, *parts = self.header.split(text)
        messages: list[Message] = []
        for name, body in zip(parts[::2], parts[1::2], strict=True):
            role, content = _ROLES.get(name.lower()), self._content(body)
            if role is None or content is None:
                return None
            messages += _turn(role, content)
        return tuple(messages)

    def answer(self, text: str) -> str:
        """Return an answer without its header, its end token and the white space around it."""
        if (headed := self.headed_answer(text)) is not None:
            return headed
        content = self._content(text)
        return text if content is None else content.strip()

    def headed_answer(self, text: str) -> str | None:
        """Return the answer in a text that is one turn of the assistant, with its header. None for other texts."""
        turns = self.split(text.lstrip() if self.has_tokens else text)
        is_answer = turns is not None and [turn["role"] for turn in turns] == ["assistant"]
        return turns[0]["content"].strip() if turns is not None and is_answer else None

    def _content(self, body: str) -> str | None:
        if self.end is None:
            return body.strip()
        content, *rest = self.end.split(body)
        return content if not any(part.strip() for part in rest) else None


_ROLES = {**ROLES, "[inst]": "user", "[/inst]": "assistant"}


def _turn(role: str, content: str) -> list[Message]:
    """Return a turn. A system text that is written in the user's turn, as Llama 2 does, is a turn of its own."""
    head, end, rest = content.partition("<</SYS>>")
    if role == "user" and end and head.lstrip().startswith("<<SYS>>"):
        system = head.lstrip().removeprefix("<<SYS>>").strip()
        return [Message(role="system", content=system), Message(role="user", content=rest.strip())]
    return [Message(role=role, content=content)]


def _lines(speakers: str, separator: str) -> Markup:
    """Return the markup of lines like "Human: ..." and "Assistant: ...", with `separator` before each."""
    return Markup(
        name=f"{speakers.replace('|', '/')} {'lines' if separator == LINE else 'paragraphs'}",
        header=re.compile(rf"(?:\A\s*|{separator})({speakers}):"),
        later=f"{separator}Assistant:",
    )


def _headings(speakers: str) -> Markup:
    """Return the markup of "### Human: ...### Assistant: ...", as in Guanaco, with or without line ends between."""
    return Markup(
        name=f"### {speakers.replace('|', '/')} lines",
        header=re.compile(rf"\s*(?<!#)### ({speakers}):"),
        later="### Assistant:",
    )


LINE, PARAGRAPH = "\n", "\n\n"
_TOKENS = (
    ("ChatML", r"<\|im_start\|>(\w+)(?:\n|<\|im_sep\|>|\Z)", r"<\|im_end\|>|<\|endoftext\|>\s*\Z"),
    (
        "Llama 3",
        r"(?:<\|begin_of_text\|>)?<\|start_header_id\|>(\w+)<\|end_header_id\|>(?:\n\n|\Z)",
        r"<\|eot_id\|>|<\|end_of_text\|>",
    ),
    ("Gemma", r"(?:<bos>)?<start_of_turn>(\w+)(?:\n|\Z)", r"<end_of_turn>|<eos>\s*\Z"),
    ("Zephyr", r"<\|(system|user|assistant)\|>\n?", r"</s>|<\|end\|>|<\|endoftext\|>"),
    ("Llama 2", r"\s*(?:<s>\s*)?(\[INST\]|\[/INST\]) ?", r"\s*</s>"),
    (
        "DeepSeek",
        r"(?:<\uff5cbegin▁of▁sentence\uff5c>)?<\uff5c(User|Assistant)\uff5c>",
        r"<\uff5cend▁of▁sentence\uff5c>",
    ),
)
_NEMO = Markup(
    "NeMo",
    # A system turn without text is left out: the template writes one where there is no system text.
    re.compile(r"(?:\A<extra_id_0>System\s+(?=<extra_id_1>)|\A|\n)<extra_id_[01]>(System|User|Assistant)(?:\n|\Z)"),
    re.compile(r"\s*<extra_id_1>\s*\Z"),
    first="<extra_id_1>User\n",  # HelpSteer2 has prompts without it
)
MARKUPS = (
    *(Markup(name, re.compile(header), re.compile(end)) for name, header, end in _TOKENS),
    _NEMO,
    _lines("Human|Assistant", PARAGRAPH),
    _lines("Human|Assistant", LINE),
    _lines("System|User|Assistant", PARAGRAPH),
    _lines("System|User|Assistant", LINE),
    _headings("Human|Assistant"),
    _headings("User|Assistant"),
)
"""Supported markups, in the order in which they are tried."""
_CONTROL = (
    r"<\|im_(?:start|sep|end)\|>|<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id)\|>"
    r"|<bos>|<eos>|<(?:start|end)_of_turn>|<\|(?:system|user|assistant|end|endoftext)\|>|\[/?INST\]"
    r"|<\uff5c[^\uff5c]+\uff5c>"
)
"""Control tokens of the markups. Not `<s>` and `</s>` alone, which HTML has as well."""
_TOKEN = re.compile(
    rf"\A\s*(?:<s>\s*)?(?:{_CONTROL}|<extra_id_[01]>(?:System|User|Assistant)\n)"
    rf"|(?:{_CONTROL}|\n<extra_id_1>)\s*(?:</s>\s*)?\Z"
)
_OPEN = re.compile(
    r"(?:(?:(?:\A|\s)ASSISTANT|(?<!#)### (?:Response|Assistant)):"
    r"|<\|im_start\|>assistant|\[/INST\]|<\|assistant\|>)\s*\Z"
)


def read_markup(text: object) -> tuple[Markup, tuple[Message, ...]] | None:
    """Return the markup and the turns of a rendered dialogue, or None for other cells."""
    if not isinstance(text, str):
        return None
    return next(((markup, turns) for markup in MARKUPS if (turns := markup.turns(text))), None)


def read_headed(prompt: object, *answers: object) -> tuple[Markup, tuple[Message, ...]] | None:
    """Return the markup and the turns of a prompt like "Human: ...", if all answers are turns like "Assistant: ...".

    A prompt alone may begin with such a word as plain text.
    """
    if not isinstance(prompt, str):
        return None
    markups = (each for each in MARKUPS if all(isinstance(text, str) and each.headed_answer(text) for text in answers))
    return next(((markup, turns) for markup in markups if (turns := markup.split(prompt))), None)


def is_dialogue_in_lines(text: object) -> bool:
    """Return True for a rendered dialogue without control tokens, which an answer may be, too."""
    rendered = read_markup(text)
    return rendered is not None and not rendered[0].has_tokens


def occurs(text: str, turns: tuple[Message, ...]) -> bool:
    """Return True if a text, or the contents of a rendered text, occurs in turns. White space does not count."""
    rendered = read_markup(text)
    forms = [text] if rendered is None else [text, _contents(rendered[1])]
    return any(" ".join(form.split()) in _contents(turns) for form in forms)


def _contents(turns: tuple[Message, ...]) -> str:
    return " ".join(" ".join(turn["content"] for turn in turns).split())


def refuse_rendered(example: PreferenceExample) -> None:
    """Refuse a pair with parts of a rendered dialogue that could not be read.

    Raises:
        BadRow: A text begins or ends with a control token of a template, or the prompt ends with an open answer.
    """
    turns = [turn["content"] for turn in example.prompt]
    found = next((text for text in (*turns, example.chosen, example.rejected) if _TOKEN.search(text)), None)
    if found is None and _OPEN.search(turns[-1]):
        found = turns[-1]
    if found is not None:
        raise BadRow(
            "rendered text",
            f"found control tokens or headers of a template in {found[:30]!r} ... {found[-30:]!r}. Remove them, so "
            "that the policy's own template can render the pair, or set data.columns.rendered=text to keep them",
        )
