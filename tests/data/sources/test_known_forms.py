"""Rows in the forms of known data sets, each with the pair that it means."""

import json
import math
from typing import Any

import pytest

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow, Tie

GOOD, BAD, QUESTION = "Keep it dry.", "I do not know.", "Something about tea?"
USER = {"role": "user", "content": QUESTION}
PROMPT = (USER,)


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversation(answer: str) -> list[dict[str, str]]:
    return [USER, assistant(answer)]


def turns(row: dict[str, Any], **columns: Any) -> tuple[Any, str, str]:
    example = to_example(row, "x line 1", Columns(**columns))
    return example.prompt, example.chosen, example.rejected


def reason(row: dict[str, Any], **columns: Any) -> str:
    with pytest.raises(BadRow) as caught:
        to_example(row, "x line 1", Columns(**columns))
    return f"{caught.value}"


# Two answers and a label: (columns of the answers, label, value if the first is better, if the second is, ties)
KNOWN = [
    ({"history": QUESTION}, ("human_ref_A", "human_ref_B"), "labels", [1, "1", 1.0, "1.0"], [0, "0", " 0.0"], []),
    ({"prompt": QUESTION}, ("response_0", "response_1"), "better_response_id", [0], [1], []),
    (
        {"context": [USER]},
        ("response1", "response2"),
        "overall_preference",
        [-3, -1, "-2", "-2.0"],
        [1, 3.0, "2.00"],
        [0, "0", -0.0],
    ),
    ({"prompt": QUESTION}, ("response_1", "response_2"), "preference_strength", [-1], [2], [0]),
    ({"prompt": QUESTION}, ("response_a", "response_b"), "winner", ["model_a"], ["Model_B"], ["tie", "both_bad"]),
    ({"instruction": QUESTION}, ("output_1", "output_2"), "preference", [1], [2], []),
]


@pytest.mark.parametrize("form", KNOWN, ids=[form[2] for form in KNOWN])
def test_labelled_answers_of_known_data_sets(form: Any) -> None:
    prompt, (first, second), label, firsts, seconds, ties = form
    for value in firsts:
        assert turns({**prompt, first: GOOD, second: BAD, label: value}) == (PROMPT, GOOD, BAD)
    for value in seconds:
        assert turns({**prompt, first: BAD, second: GOOD, label: value}) == (PROMPT, GOOD, BAD)
    for value in ties:
        with pytest.raises(Tie):
            turns({**prompt, first: GOOD, second: BAD, label: value})
    assert "unknown label: found 'x'" in reason({**prompt, first: GOOD, second: BAD, label: "x"})
    assert "unknown label: found None" in reason({**prompt, first: GOOD, second: BAD, label: None})
    assert "unknown label: found '99" in reason({**prompt, first: GOOD, second: BAD, label: "9" * 5000 + "."})


@pytest.mark.parametrize("columns", [{}, {"chosen": "conversation_a", "rejected": "conversation_b"}])
def test_labelled_answers_arena_conversations(columns: dict[str, str]) -> None:
    """The label decides, even if the two conversations are set as `chosen` and `rejected`."""
    row = {"conversation_a": conversation(BAD), "conversation_b": conversation(GOOD), "model_a": "m1", "turn": 1}
    assert turns({**row, "winner": "model_b"}, **columns) == (PROMPT, GOOD, BAD)
    assert turns({**row, "winner": "model_a"}, **columns) == (PROMPT, BAD, GOOD)
    for tie in ("tie", "tie (bothbad)", "both_bad", "tie (inconsistent)"):
        with pytest.raises(Tie):
            turns({**row, "winner": tie}, **columns)


def test_labelled_answers_with_settings() -> None:
    row = {"prompt": QUESTION, "left": BAD, "right": GOOD, "better": "R"}
    answers = {"answer_a": "left", "answer_b": "right", "label": "better"}
    values = {"label_a": ["L"], "label_b": ["R"], "label_tie": ["-"]}
    assert turns(row, **answers, **values) == (PROMPT, GOOD, BAD)
    assert turns({**row, "better": "right"}, **answers) == (PROMPT, GOOD, BAD)
    with pytest.raises(Tie):
        turns({**row, "better": "-"}, **answers, **values)
    assert "data.columns.label_a, label_b and label_tie" in reason(row, **answers)
    assert "missing answer: no 'left'" in reason({"prompt": QUESTION, "right": GOOD, "better": "R"}, **answers)


def test_labelled_answers_with_another_label() -> None:
    row = {"prompt": QUESTION, "response_0": GOOD, "response_1": BAD, "better_response_id": 0, "safer_response_id": 1}
    assert turns(row, label="safer_response_id") == (PROMPT, BAD, GOOD)
    assert "no answers for the label 'verdict'" in reason(row, label="verdict")


def test_labelled_answers_yield_to_chosen() -> None:
    row = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "response_0": BAD, "response_1": GOOD}
    assert turns({**row, "better_response_id": 0}) == (PROMPT, GOOD, BAD)


def test_labelled_answers_ambiguous_columns() -> None:
    row = {"prompt": QUESTION, "response_0": "a", "response_1": "b", "better_response_id": 0}
    row |= {"human_ref_A": "c", "human_ref_B": "d", "labels": 1}
    assert "human_ref_A and human_ref_B, ordered by labels; answers response_0 and" in reason(row)


def test_missing_answer_names_the_label_settings() -> None:
    assert "set data.columns.answer_a, answer_b and label" in reason({"prompt": QUESTION, "text_1": "a", "text_2": "b"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer_a": "left"}, "found answer_a='left' and answer_b=None, expected both or neither"),
        ({"answer_a": "left", "answer_b": "right"}, r"without columns\.label"),
        ({"system": "prompt"}, r"found \['prompt'\] for more than one purpose"),
    ],
)
def test_columns_bad_settings(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Columns(**columns)


# Prompts in columns of other names, system texts and inputs


def test_system_column_is_a_turn() -> None:
    system = {"role": "system", "content": "You are PIRATE."}
    row = {"question": QUESTION, "chosen": GOOD, "rejected": BAD}
    expected = ((system, USER), GOOD, BAD)
    assert turns({**row, "system": "You are PIRATE."}) == expected
    assert turns({**row, "system_prompt": "You are PIRATE."}, prompt="question") == expected
    assert turns({**row, "persona": "You are PIRATE."}, system="persona") == expected
    assert turns({**row, "system": ""}) == turns({**row, "system": "gpt"}, source="system") == (PROMPT, GOOD, BAD)
    assert turns({**row, "system": "gpt"}, system="none") == (PROMPT, GOOD, BAD)
    both = {"chosen": [system, *conversation(GOOD)], "rejected": [system, *conversation(BAD)]}
    assert turns({**both, "system": "You are PIRATE."}) == expected
    assert "different system texts in 'system' and in the prompt" in reason({**both, "system": "Be kind."})
    assert "in 'system' and 'system_prompt'" in reason({**row, "system": "a", "system_prompt": "b"})


def test_input_column_is_appended() -> None:
    row = {"instruction": "Translate.", "input": "Guten Tag", "chosen": "Good day", "rejected": "Bye"}
    expected = ({"role": "user", "content": "Translate.\n\nGuten Tag"},)
    assert turns(row)[0] == turns(row, prompt="instruction")[0] == expected
    assert turns({**row, "input": ""})[0] == ({"role": "user", "content": "Translate."},)
    other = {"prompt": "Translate.", "input": "Guten Tag", "chosen": "Good day", "rejected": "Bye"}
    assert "ambiguous columns: found text in 'prompt' and in 'input'" in reason(other)
    assert "ambiguous columns: found text in 'prompt' and in 'input'" in reason({**other, "input": "Trans"})
    assert turns(other, input="input")[0] == expected
    assert turns(other, input="none")[0] == ({"role": "user", "content": "Translate."},)
    assert turns({**other, "input": "Translate."})[0] == ({"role": "user", "content": "Translate."},)
    alone = {"input": QUESTION, "chosen": GOOD, "rejected": BAD}
    assert turns(alone, prompt="input") == (PROMPT, GOOD, BAD)
    assert "the row also has 'input'" in reason(alone)


@pytest.mark.parametrize(
    ("instruction", "text", "prompt"),
    [
        ("Is the number even? Answer for 14.", "4", "Is the number even? Answer for 14.\n\n4"),
        ("Is the review good or bad?", "good", "Is the review good or bad?\n\ngood"),
        ("Sort the numbers:\n12 4", "4", "Sort the numbers:\n12 4\n\n4"),
        ("Translate.\n\nGuten Tag", " Guten Tag\n", "Translate.\n\nGuten Tag"),
        ("Translate.\n\nGuten Tag\n", "Tag", "Translate.\n\nGuten Tag\n\n\nTag"),
    ],
)
def test_input_that_occurs_in_its_instruction(instruction: str, text: str, prompt: str) -> None:
    """Only an input at the end, after a blank line, is in the prompt already."""
    row = {"instruction": instruction, "input": text, "chosen": GOOD, "rejected": BAD}
    assert turns(row) == (({"role": "user", "content": prompt},), GOOD, BAD)


@pytest.mark.parametrize("cell", [4, 0.5, True, ["Be kind."], {"role": "system", "content": "Be kind."}])
def test_system_or_input_that_is_no_text(cell: Any) -> None:
    """What is in these columns is in the prompt, or the row is refused."""
    row = {"instruction": QUESTION, "chosen": GOOD, "rejected": BAD}
    for column, setting in (("system", "system"), ("system_prompt", "system"), ("input", "input")):
        assert f"wrong type: found {type(cell).__name__.replace('list', 'a list of 1')}" in reason(
            {**row, column: cell}
        )
        assert f"in {column!r}, expected text" in reason({**row, column: cell})
        assert f"or set data.columns.{setting} to a name that no row has" in reason({**row, column: cell})
        assert turns({**row, column: cell}, **{setting: "none"}) == (PROMPT, GOOD, BAD)
        assert f"in 'extra', expected text. Write it as text, or set data.columns.{setting}" in reason(
            {**row, "extra": cell}, **{setting: "extra"}
        )
        for empty in (None, "", " ", [], {}, math.nan):
            assert turns({**row, column: empty}) == (PROMPT, GOOD, BAD)


def test_prompt_cell_is_null(write_rows: Any) -> None:
    """As in a merged table. A row with an empty text as its prompt is bad."""
    row = {"prompt": QUESTION, "context": "A long text.", "chosen": GOOD, "rejected": BAD}
    report = DataReport()
    path = write_rows([row, {**row, "prompt": None}, {"question": QUESTION, "chosen": GOOD, "rejected": BAD}])
    examples = list(RowSource(str(path)).read(report))
    assert [example.prompt[0]["content"] for example in examples] == [QUESTION, "A long text.", QUESTION]
    assert report.forms == {"prompt from context, as prompt is empty": 1}
    assert "empty prompt" in reason({**row, "prompt": ""})


def test_answers_that_are_dialogues_in_lines() -> None:
    """A text in another column may be the prompt. It is not left out."""
    sides = {"chosen": "User: hi\nAssistant: hello", "rejected": "User: hi\nAssistant: go"}
    prompt = {"role": "user", "content": "Write a dialogue."}
    row = {"question": "Write a dialogue.", **sides}
    assert "found dialogues as answers, and text in 'question' that is in no turn of them" in reason(row)
    assert turns(row, prompt="question") == ((prompt,), *sides.values())
    expected = (({"role": "user", "content": "hi"},), "hello", "go")
    assert turns(row, prompt="none") == turns({**sides, "question": "hi"}) == expected
    assert turns({**sides, "question": ""}) == expected
    assert turns({"question": "Greet.", "chosen": conversation(GOOD), "rejected": conversation(BAD)})[0] == PROMPT


def test_prompt_column_ambiguous() -> None:
    row = {"question": QUESTION, "context": "Tea is a drink.", "chosen": GOOD, "rejected": BAD}
    assert "no 'prompt', but 'question' and 'context'; set data.columns.prompt" in reason(row)
    assert turns(row, prompt="question") == (PROMPT, GOOD, BAD)


# Messages


@pytest.mark.parametrize("spell", [json.dumps, repr, lambda cell: json.dumps(cell, indent=1)])
def test_message_lists_as_text(spell: Any) -> None:
    """A CSV file of message lists has such cells."""
    tricky = "It's \"é\\d\".\n[{'role': x}]"
    row = {"prompt": QUESTION, "chosen": spell(conversation(tricky)), "rejected": spell(conversation(BAD))}
    assert turns(row) == (PROMPT, tricky, BAD)
    assert turns({"prompt": spell([USER]), "chosen": GOOD, "rejected": spell(assistant(BAD))}) == (PROMPT, GOOD, BAD)
    assert turns(row, rendered="text") == (PROMPT, row["chosen"], row["rejected"])


def test_message_list_as_text_is_refused() -> None:
    printed = "[{'id': 1, 'content': 'a', 'role': 'user'}\n {'content': 'b', 'role': 'assistant'}]"  # by numpy
    for broken in (printed, printed.replace("'id': 1, ", ""), f"array({printed}, dtype=object)"):
        assert "neither JSON nor Python" in reason({"prompt": QUESTION, "chosen": broken, "rejected": BAD})
    data = '[{"text": "a", "n": 1}]'
    assert turns({"prompt": QUESTION, "chosen": data, "rejected": BAD}) == (PROMPT, data, BAD)


def test_message_list_as_text_with_other_keys() -> None:
    """Any key may come first. An object whose role is none of a message is an answer."""
    items = [{"id": n, **assistant(text)} for n, text in enumerate((GOOD, BAD))]
    for first, second in ((items[0], items[1]), ([items[0]], [items[1]])):
        row = {"prompt": QUESTION, "chosen": json.dumps(first), "rejected": repr(second)}
        assert turns(row) == (PROMPT, GOOD, BAD)
    for text in (
        '{"name": "Ann", "role": "admin", "text": "hi"}',
        '{"id": 1, "role": "assistant"} is what I',
        '{"model": "m", "messages": [{"role": "user", "content": "a"}]}\nThis calls it.',
    ):
        assert turns({"prompt": QUESTION, "chosen": text, "rejected": BAD}) == (PROMPT, text, BAD)


def test_content_parts_are_joined() -> None:
    def parts(*texts: str) -> list[dict[str, Any]]:
        return [{"type": "text", "text": text, "image": None} for text in texts]

    row = {"prompt": [{"role": "user", "content": parts(QUESTION, "Be brief.")}]}
    row |= {"chosen": [assistant(parts(GOOD))], "rejected": [assistant([BAD])]}  # type: ignore[arg-type]
    assert turns(row) == (({"role": "user", "content": f"{QUESTION}\nBe brief."},), GOOD, BAD)
    image = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert "part of type 'image_url'" in reason({**row, "chosen": [assistant(image)]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("user", "answer"),
    [("human", "gpt"), ("Human", "Assistant"), ("USER", "bot"), ("prompter", "assistant"), ("user", "model")],
)
def test_roles_under_other_names(user: str, answer: str) -> None:
    for role, content in (("role", "content"), ("from", "value"), ("speaker", "text")):
        sides = [[{role: user, content: QUESTION}, {role: answer, content: text}] for text in (GOOD, BAD)]
        assert turns({"chosen": sides[0], "rejected": sides[1]}) == (PROMPT, GOOD, BAD)


def test_message_with_two_roles() -> None:
    item = {"role": "user", "from": "gpt", "content": "a"}
    row = {"prompt": [item], "chosen": GOOD, "rejected": BAD}
    assert "ambiguous message: found different values under 'role' and 'from'" in reason(row)
    assert turns({**row, "prompt": [USER | {"from": None, "value": None}]}) == (PROMPT, GOOD, BAD)


# Text that a template has rendered

SYSTEM = {"role": "system", "content": "Be kind."}
DIALOGUE = (SYSTEM, {"role": "user", "content": "Hi"}, assistant("Hello"), USER)
RENDERED = {
    "ChatML": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    f"<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "Zephyr": f"<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\n{QUESTION}</s>\n"
    "<|assistant|>\n",
    "Llama 2": f"<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] {QUESTION} [/INST]",
    "NeMo": "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello\n"
    f"<extra_id_1>User\n{QUESTION}\n<extra_id_1>Assistant\n",
    "paragraphs": f"System: Be kind.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: {QUESTION}\n\nAssistant:",
    "lines": f"System: Be kind.\nUser: Hi\nAssistant: Hello\nUser: {QUESTION}\nAssistant:",
}
ENDS = {
    "ChatML": "<|im_end|>\n",
    "Llama 3": "<|eot_id|>",
    "Zephyr": "</s>\n",
    "Llama 2": " </s>",
    "NeMo": "\n<extra_id_1>",
}
WITHOUT_SYSTEM = {
    "NeMo without a system text": "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello\n"
    f"<extra_id_1>User\n{QUESTION}\n<extra_id_1>Assistant\n",
    "Gemma": f"<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    f"<start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
    "Human paragraphs": f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {QUESTION}\n\nAssistant:",
    "Human lines": f"Human: Hi\nAssistant: Hello\nHuman: {QUESTION}\nAssistant:",
    "Guanaco": f"### Human: Hi### Assistant: Hello### Human: {QUESTION}### Assistant:",
    "### lines": f"### Human: Hi\n### Assistant: Hello\n### Human: {QUESTION}\n### Assistant:",
}


@pytest.mark.parametrize("name", [*RENDERED, *WITHOUT_SYSTEM])
def test_rendered_text_is_read_as_turns(name: str) -> None:
    text, end = (RENDERED | WITHOUT_SYSTEM)[name], ENDS.get(name, "")
    expected = (DIALOGUE if name in RENDERED else DIALOGUE[1:], GOOD, BAD)
    assert turns({"prompt": text, "chosen": f" {GOOD}{end}", "rejected": BAD}) == expected
    assert turns({"prompt": text.rstrip(), "chosen": GOOD, "rejected": [assistant(BAD)]}) == expected
    whole = {"chosen": f"{text} {GOOD}{end}", "rejected": f"{text} {BAD}{end}"}
    prompt, chosen, rejected = turns(whole)
    assert (prompt, chosen.strip(), rejected.strip()) == expected
    assert turns({"prompt": text, **whole})[0] == expected[0]


@pytest.mark.parametrize(
    ("user", "header"),
    [
        ("\n\nHuman:", "\n\nAssistant:"),
        ("\n\nHuman:", "Assistant:"),
        ("Human:", "Assistant:"),
        ("User:", "\n\nAssistant:"),
        ("### Human:", "### Assistant:"),
    ],
)
def test_header_of_an_answer_is_no_text(user: str, header: str) -> None:
    row = {"prompt": f"{user} {QUESTION}", "chosen": f"{header} {GOOD}", "rejected": f"{header} {BAD}"}
    forms: list[str] = []
    example = to_example(row, "x", forms=forms)
    assert (example.prompt, example.chosen, example.rejected) == (PROMPT, GOOD, BAD)
    assert [form.partition(" (")[0] for form in forms] == ["rendered text"]
    assert turns({**row, "prompt": QUESTION}) == (PROMPT, row["chosen"], row["rejected"])


@pytest.mark.parametrize(("strength", "answers"), [(-2, (GOOD, BAD)), (3, (BAD, GOOD))])
def test_turns_of_helpsteer2(strength: int, answers: tuple[str, str]) -> None:
    """Its card: the first user turn has no header. https://huggingface.co/datasets/nvidia/HelpSteer2"""
    prompt = f"Hi\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\n{QUESTION}"
    row = {"prompt": prompt, "response_1": GOOD, "response_2": BAD, "preference_strength": strength}
    assert turns(row) == (DIALOGUE[1:], *answers)
    assert turns(row | {"prompt": QUESTION})[0] == PROMPT


def test_rendered_text_kept_as_text() -> None:
    row = {"prompt": RENDERED["ChatML"], "chosen": f"{GOOD}<|im_end|>", "rejected": BAD}
    text = ({"role": "user", "content": RENDERED["ChatML"]},)
    assert turns(row, rendered="text") == (text, f"{GOOD}<|im_end|>", BAD)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "chosen": f"{GOOD}<|im_end|>", "rejected": BAD},
        {"prompt": f"### Instruction:\n{QUESTION}\n\n### Response:\n", "chosen": GOOD, "rejected": BAD},
        {"prompt": f"{QUESTION}### Assistant:", "chosen": GOOD, "rejected": BAD},
        {"prompt": f"A chat. USER: {QUESTION} ASSISTANT:", "chosen": GOOD, "rejected": BAD},
        {"prompt": f"<|im_start|>user\n{QUESTION}<|im_end|> and <|im_end|>", "chosen": GOOD, "rejected": BAD},
        {"prompt": "<|im_start|>wizard\nHi<|im_end|>", "chosen": GOOD, "rejected": BAD},
        {"prompt": QUESTION, "chosen": f"<extra_id_1>Assistant\n{GOOD}", "rejected": f"<extra_id_1>User\n{BAD}"},
    ],
)
def test_rendered_text_is_refused(row: dict[str, str]) -> None:
    assert "rendered text: found control tokens or headers" in reason(row)
    assert turns(row, rendered="text")[1] == row["chosen"]


@pytest.mark.parametrize("text", ["Human: or machine?", "What does <|im_end|> mean?", "User: a name, or a role?"])
def test_rendered_text_is_no_plain_text(text: str) -> None:
    row = {"prompt": text, "chosen": "Human: a.\nAssistant: b.", "rejected": "<s>no</s>"}
    assert turns(row) == (({"role": "user", "content": text},), row["chosen"], row["rejected"])


# Reports


def test_answers_that_repeat_the_prompt_are_counted(write_rows: Any) -> None:
    texts = [(f"{QUESTION} {GOOD}", f"\n{QUESTION} {BAD}"), (f"{QUESTION} {GOOD}", BAD), (GOOD, BAD)]
    report = DataReport()
    path = write_rows([{"prompt": f"{QUESTION}\n", "chosen": good, "rejected": bad} for good, bad in texts])
    examples = list(RowSource(str(path)).read(report))
    assert [(example.chosen, example.rejected) for example in examples] == texts
    assert report.forms == {"answers that begin with the prompt": 1}


def test_source_counts_forms_and_ties(write_rows: Any) -> None:
    rows = [
        {"context": [USER], "response1": GOOD, "response2": BAD, "overall_preference": value, "domain": "general"}
        for value in (-3, 0, 2, 0)
    ]
    report = DataReport()
    examples = list(RowSource(str(write_rows([*rows, {**rows[0], "system": "Be kind."}]))).read(report))
    assert [example.chosen for example in examples] == [GOOD, BAD, GOOD]
    assert (report.read, report.dropped, report.bad) == (5, {"tie": 2}, {})
    form = "answers response1 and response2, ordered by overall_preference"
    assert report.forms == {form: 3, "system text from system": 1}
    assert "  3 read from a special form: " + form in str(report)
    assert report.meta == {"domain": 3}
    assert "  columns that are in no text: domain" in str(report)


def test_report_lists_no_column_of_splits(write_rows: Any) -> None:
    """The column decides which rows are read. Its value stays with the pair."""
    rows = [{"prompt": "?", "chosen": GOOD, "rejected": BAD, "part": part, "note": 1} for part in ("train", "test")]
    report = DataReport()
    (example,) = RowSource(str(write_rows(rows)), split="test", split_column="part").read(report)
    assert example.meta == {"part": "test", "note": 1}
    assert "  columns that are in no text: note\n" in f"{report}\n"


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("content", [GOOD, None])
def test_message_text_beside_content_is_refused(key: str, content: str | None) -> None:
    answer = {"role": "assistant", "content": content, key: [{"name": "brew"}]}
    message = f"text beside the content: a message has {key!r}"
    assert message in reason({"prompt": QUESTION, "chosen": [answer], "rejected": BAD})
    assert message in reason({"chosen": [USER, answer], "rejected": conversation(BAD)})
    assert message in reason({"prompt": [USER, {**answer, "content": GOOD}, USER], "chosen": GOOD, "rejected": BAD})


def test_message_keys_in_no_text_are_listed(write_rows: Any) -> None:
    answer = {**assistant(GOOD), "tool_calls": [], "thinking": None, "weight": 0, "name": None}
    row = {"chosen": [{**USER, "time": 1}, answer], "rejected": conversation(BAD)}
    report = DataReport()
    examples = list(RowSource(str(write_rows([row, {**row, "chosen": json.dumps(row["chosen"])}]))).read(report))
    assert [(example.prompt, example.chosen) for example in examples] == [(PROMPT, GOOD)] * 2
    assert report.meta == {"chosen.time": 2, "chosen.weight": 2}
    assert "  columns that are in no text: chosen.time, chosen.weight" in str(report)
