"""Plain text template for base models, which have no chat template."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.tokenization.system_turns import SystemTurns
from lpc_lightning.data.tokenization.template import AnswerFrame, Note, Template, TurnMarks, no_note
from lpc_lightning.data.tokenization.text_encoder import eos_id, special_texts
from lpc_lightning.types import Message


class PlainTemplate(Template):
    """Plain text: "System: ...\\n\\nUser: ...\\n\\nAssistant:", one space, the answer and the eos token.

    The text starts with the beginning-of-sequence token if the tokenizer adds one by default.

    Args:
        tokenizer: Any tokenizer with an eos token.
        system_turns: Treatment of system turns. `auto` is `keep`.

    Raises:
        DataError: The tokenizer has no eos token.
    """

    kind = "plain"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_turns: SystemTurns = "auto") -> None:
        bare = tokenizer.encode("User", add_special_tokens=False)
        full = tokenizer.encode("User")
        lead = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        super().__init__(
            tokenizer,
            AnswerFrame(end_id=eos_id(tokenizer), before=" "),
            special_texts(tokenizer),
            full[:lead],
            TurnMarks("User:", "Assistant:", str(tokenizer.eos_token)),
            "keep" if system_turns == "auto" else system_turns,
        )

    def render(self, prompt: Sequence[Message], note: Note = no_note) -> str:
        """See `Template.render`."""
        return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n\n" for turn in prompt) + "Assistant:"
