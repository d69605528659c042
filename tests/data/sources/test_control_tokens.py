"""Answers with the control tokens of a template: read behind a prompt in its markup, refused behind a plain one."""

from __future__ import annotations

from typing import Any

import pytest

from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.rows import BadRow

QUESTION, GOOD, BAD = "Something about tea?", "Keep it dry.", "I do not know."

# Around an answer, as the templates of models on the hub write them. The first three have the end of a text alone.
AROUND = {
    "Qwen base": ("", "<|endoftext|>"),
    "Llama 3 base": ("", "<|end_of_text|>"),
    "Gemma base": ("", "<eos>"),
    "ChatML": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    "Phi-4": ("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    "Llama 3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    "Gemma": ("<start_of_turn>model\n", "<end_of_turn>\n"),
    "Zephyr": ("<|assistant|>\n", "</s>\n"),
    "Phi-3": ("<|assistant|>\n", "<|end|>\n"),
    "Llama 2": ("[/INST] ", " </s>"),
    "DeepSeek": ("<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>"),
    "NeMo": ("<extra_id_1>Assistant\n", "\n<extra_id_1>"),
}
PROMPTS = {
    "ChatML": f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    "Llama 3": f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "Gemma": f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
}


def faults(row: dict[str, Any]) -> str:
    with pytest.raises(BadRow) as caught:
        to_example(row, "x line 1")
    return str(caught.value)


@pytest.mark.parametrize("name", AROUND)
def test_control_tokens_behind_a_plain_prompt(name: str) -> None:
    """The docs promise that neither a header nor an end is trained as text. HTML has `</s>`, too."""
    header, end = AROUND[name]
    texts = {f"{header}{GOOD}", f"{GOOD}{end}", f"{header}{GOOD}{end}", f"<s>{header}{GOOD}"}
    of_html = {GOOD, f"<s>{GOOD}", f"{GOOD}</s>\n", f"{GOOD} </s>"}
    for text in texts - of_html:
        assert "rendered text: found control tokens" in faults({"prompt": QUESTION, "chosen": text, "rejected": BAD})
        assert "rendered text: found control tokens" in faults({"prompt": QUESTION, "chosen": BAD, "rejected": text})
    for text in of_html:
        assert to_example({"prompt": QUESTION, "chosen": text, "rejected": BAD}, "x").chosen == text


@pytest.mark.parametrize(
    ("name", "end"), [("ChatML", "<|endoftext|>"), ("Gemma", "<eos>"), ("Llama 3", "<|end_of_text|>")]
)
def test_control_token_that_ends_a_text(name: str, end: str) -> None:
    """Behind a prompt in the markup of its family, it is left out, as the end of a turn is."""
    for ends in (end, f"{AROUND[name][1]}{end}\n"):
        for before in ("", PROMPTS[name]):
            chosen, rejected = (f"{before}{text}{ends}" for text in (GOOD, BAD))
            example = to_example({"prompt": PROMPTS[name], "chosen": chosen, "rejected": rejected}, "x")
            assert [turn["content"] for turn in example.prompt] == [QUESTION]
            assert (example.chosen, example.rejected) == (GOOD, BAD)


@pytest.mark.parametrize(
    "text", ["What do <|im_end|> and <eos> mean?", "a <| b |> c", "<b>bos</b>", "<extra_id_0> tea"]
)
def test_control_token_inside_a_text(text: str) -> None:
    example = to_example({"prompt": text, "chosen": text + "!", "rejected": BAD}, "x")
    assert (example.prompt[0]["content"], example.chosen) == (text, text + "!")
