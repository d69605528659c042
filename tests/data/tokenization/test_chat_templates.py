"""Chat templates with the structure of popular ones. The oracle is the text that the decoded ids must have."""

from functools import partial

import pytest

from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow, DataError
from lpc_lightning.data.tokenization.lengths import LengthPolicy
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.data.tokenization.tokens import tokenize_examples
from lpc_lightning.types import PreferenceExample

QWEN3 = """\
{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}
{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set c = m.content %}
{%- set r = '' %}{%- if '</think>' in c %}{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or r) %}{{- '<think>\n' + r + '\n</think>\n\n' }}{%- endif %}
{{- c + '<|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
R1 = """\
{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}
{{- '<|im_start|>' + m['content'] }}{% else %}{% set c = m['content'] %}
{%- if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}
{{- '<|im_end|>' + c + '<|endoftext|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_end|><think>\n' }}{% endif %}"""
GEMMA = """\
{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{% endif %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
WITHOUT_SYSTEM = """\
{% for m in messages %}{% if m['role'] != 'system' %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LAST_TURN_ONLY = "{% set m = messages[-1] %}" + (
    "{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{% else %}"
    "{{ '<|im_start|>user\n' + messages[-2]['content'] + '<|im_end|>\n<|im_start|>assistant\n' + m['content'] "
    "+ '<|im_end|>\n' }}{% endif %}"
)
WITHOUT_PROMPT = """\
{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
"""


@pytest.fixture
def template(fresh):
    def make(chat_template: str, name: str = "chatml", **settings):
        tokenizer = fresh(name)
        tokenizer.chat_template = chat_template
        return make_template(tokenizer, **settings)

    return make


def example(*turns: str, chosen: str = "yes", rejected: str = "no", system: str = "") -> PreferenceExample:
    first = ({"role": "system", "content": system},) if system else ()
    prompt = tuple({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns or ("Hi",)))
    return PreferenceExample("x", (*first, *prompt), chosen, rejected)


def decoded(template, given: PreferenceExample) -> tuple[str, str]:
    pair = template.tokenize(given)
    return template.tokenizer.decode(pair.prompt_ids), template.tokenizer.decode(pair.chosen_ids)


def counted(template, *examples: PreferenceExample) -> DataReport:
    report = DataReport()
    list(tokenize_examples(examples, template, LengthPolicy(), report))
    return report


# Think blocks


@pytest.mark.parametrize("name", ["chatml", "thinking"])
@pytest.mark.parametrize(
    "answer", ["<think>\nWeigh it.\n</think>\n\nTea.", "<think>Weigh it.</think>Tea.", "Weigh it.\n</think>\n\nTea."]
)
def test_think_block_of_an_answer_is_rendered_once(template, name, answer):
    prompt, completion = decoded(template(QWEN3, name), example(chosen=answer))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert completion == "<think>\nWeigh it.\n</think>\n\nTea.<|im_end|>"


def test_answer_without_think_block_gets_an_empty_one(template):
    assert decoded(template(QWEN3), example())[1] == "<think>\n\n</think>\n\nyes<|im_end|>"


def test_template_kwargs_reach_the_chat_template(template):
    closed = template(QWEN3, arguments={"enable_thinking": False})
    prompt, completion = decoded(closed, example())
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert completion == "yes<|im_end|>"
    assert closed.fingerprint != template(QWEN3).fingerprint


def test_tools_choose_the_template_for_tools(template):
    several = {"default": QWEN3, "tool_use": "{{ tools | length }} tools:" + QWEN3}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    plain, _ = decoded(template(several), example())
    assert decoded(template(several, arguments={"tools": [tool]}), example())[0] == f"1 tools:{plain}"
    with pytest.raises(DataError, match=r"template_kwargs: found tools, .* does not read"):
        template({"default": QWEN3, "other": "{{ tools }}"}, arguments={"tools": [tool]})


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [({"enable_thinking": False}, "<think>\nWeigh.\n</think>\n\nTea."), (None, "<think>\nWeigh")],
    ids=["closed in the prompt", "never closed"],
)
def test_second_think_block_is_bad(template, arguments, answer):
    with pytest.raises(BadRow, match=r"two think blocks: the answer '<think>.* begins with <think>"):
        template(QWEN3, arguments=arguments).tokenize(example(chosen=answer))


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("<think>\nWeigh it.\n</think>\n\nTea.", "Weigh it.\n</think>\n\nTea."),
        ("Weigh it.\n</think>\n\nTea.", "Weigh it.\n</think>\n\nTea."),
        ("Tea.", "\n</think>\n\nTea."),
    ],
    ids=["own block", "continues", "no block"],
)
@pytest.mark.parametrize("name", ["chatml", "thinking"])
def test_open_think_block_of_the_prompt(template, name, answer, completion):
    prompt, found = decoded(template(R1, name), example(chosen=answer))
    assert prompt.endswith("<think>\n")
    assert found == f"{completion}<|endoftext|>"


def test_closed_think_blocks_are_counted(template):
    r1 = template(R1)
    report = counted(r1, example(), example(chosen="<think>\n1\n</think>\n\nA", rejected="<think>\n2\n</think>\n\nB"))
    assert report.kept == 2
    assert report.changed == {"think block of the generation prompt closed in front of an answer without one": 1}


def test_reasoning_that_the_template_removes_is_kept(template):
    """The template cuts reasoning off every answer. A trained answer has it."""
    removes = R1.replace("<think>\n", "")
    assert decoded(template(removes), example(chosen="<think>\n1\n</think>\n\nA"))[1] == (
        "<think>\n1\n</think>\n\nA<|endoftext|>"
    )


def test_reasoning_of_an_earlier_turn_is_counted(template):
    earlier = example("Hi", "<think>\nWeigh.\n</think>\n\nHello.", "Tea?")
    assert "Weigh" not in decoded(template(QWEN3), earlier)[0]
    assert counted(template(QWEN3), earlier, example()).changed == {
        "turn that the chat template does not render word for word": 1
    }


# System turns


@pytest.mark.parametrize("chat_template", [GEMMA, WITHOUT_SYSTEM], ids=["refused", "left out"])
def test_system_turn_is_folded_into_the_user_turn(template, chat_template):
    folding = template(chat_template)
    prompt, completion = decoded(folding, example("Tea?", system="Be kind."))
    assert prompt == "<|im_start|>user\nBe kind.\n\nTea?<|im_end|>\n<|im_start|>assistant\n"
    assert completion == "yes<|im_end|>"
    report = counted(folding, *[example("Tea?", system="Be kind.")] * 3, example())
    assert report.changed == {"system turn put in front of the next user turn": 3}
    assert report.metrics()["data/changed/system_turn_put_in_front_of_the_next_user_turn"] == 3
    assert "3 kept with a change: system turn put in front of the next user turn" in str(report)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (GEMMA, r"refused by the chat template: System role not supported; data\.system_turns: fold"),
        (
            WITHOUT_SYSTEM,
            r"left out by the chat template: the text of turn 1 \(system\).*set data\.system_turns to fold",
        ),
    ],
    ids=["refused", "left out"],
)
def test_system_turn_under_keep_is_bad(template, chat_template, message):
    with pytest.raises(BadRow, match=message):
        template(chat_template, system_turns="keep").tokenize(example("Tea?", system="Be kind."))


def test_system_turn_under_drop_is_counted(template):
    dropping = template(GEMMA, system_turns="drop")
    given = example("Tea?", system="Be kind.")
    assert decoded(dropping, given)[0] == decoded(template(GEMMA), example("Tea?"))[0]
    assert counted(dropping, given).changed == {"system turn left out": 1}


def test_system_turn_is_kept_where_it_is_rendered(tokenizers, template):
    given = example("Tea?", system="Be kind.")
    assert "<|im_start|>system\nBe kind.<|im_end|>" in decoded(make_template(tokenizers["chatml"]), given)[0]
    assert not counted(make_template(tokenizers["chatml"]), given).changed
    folded = decoded(make_template(tokenizers["chatml"], system_turns="fold"), given)[0]
    assert folded == decoded(template(GEMMA), given)[0]


def test_turn_that_the_template_leaves_out_is_bad(template):
    with pytest.raises(BadRow, match=r"left out by the chat template: the text of turn 1 \(user\)"):
        template(LAST_TURN_ONLY).tokenize(example("Hi", "Hello.", "Tea?"))


# Templates without a generation prompt


def test_header_of_an_answer_is_in_the_prompt(template, tokenizers):
    made = template(WITHOUT_PROMPT)
    given = example("Hi", "Hello.", "Tea?", system="Be kind.")
    assert decoded(made, given) == decoded(make_template(tokenizers["chatml"]), given)
    assert made.tokenizer.decode(made.prompt_ids(given.prompt)).endswith("<|im_start|>assistant\n")
    turns = [*given.prompt, {"role": "assistant", "content": "yes"}]
    for source in (made.source, made.published):
        render = partial(made.tokenizer.apply_chat_template, turns, chat_template=source, tokenize=False)
        assert render(add_generation_prompt=False) == made.tokenizer.apply_chat_template(turns, tokenize=False)
        assert render(add_generation_prompt=True) == f"{render()}<|im_start|>assistant\n"


# Text that is already rendered


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("chatml", "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"),
        ("llama3", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTea?<|eot_id|>"
                   "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("mistral", "<s>[INST] Tea? [/INST]"),
        ("mistral", "[INST] Tea? [/INST]"),
        ("base_without_bos", "User: Tea?\n\nAssistant:"),
    ],
)  # fmt: skip
def test_rendered_prompt_is_counted(tokenizers, name, prompt):
    report = counted(make_template(tokenizers[name]), example(prompt), example())
    assert report.changed["text that the template seems to have rendered already, encoded as plain text"] == 1


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>\n"), ("base_without_bos", "<|endoftext|>")])
def test_answer_with_its_own_end_token_is_counted(tokenizers, name, end):
    report = counted(make_template(tokenizers[name]), example(chosen=f"Tea.{end}"), example())
    assert report.changed["text that the template seems to have rendered already, encoded as plain text"] == 1


def test_control_tokens_in_a_text_are_counted(tokenizers):
    report = counted(make_template(tokenizers["chatml"]), example("What does <|im_start|> mean?"), example())
    assert report.changed == {"control tokens in a text, encoded as plain text": 1}


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arguments": {"enable_thinkin": False}}, r"data\.template_kwargs: found enable_thinkin, .* does not read"),
        ({"arguments": {"tokenize": True}}, r"data\.template_kwargs: found tokenize, which the suite sets itself"),
        ({"arguments": {"enable_thinking": False}, "kind": "plain"}, r"template_kwargs: .* plain template"),
        ({"system_turns": "merge"}, r"data\.system_turns: found 'merge', expected auto, keep, fold, drop"),
    ],
)
def test_invalid_settings_are_refused(template, settings, message):
    with pytest.raises(DataError, match=message):
        template(QWEN3, **settings)
