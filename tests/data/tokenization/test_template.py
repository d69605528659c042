import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from lpc_lightning.data.sources.rows import BadRow, DataError
from lpc_lightning.data.tokenization.chat_template import ChatTemplate
from lpc_lightning.data.tokenization.plain_template import PlainTemplate
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.types import PreferenceExample

CONTROL = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "</s>", "<s>", "<|endoftext|>", "<unk>", "<|begin_of_text|>"]
# Metaspace tokenizers encode a space as ▁, so the character itself is not decoded.
letters = st.characters(codec="utf-8", exclude_characters="▁")
pieces = st.text(letters) | st.sampled_from(
    [*CONTROL, " ", "\n", "  ", "\n\n", "\x00", "e\u0301", "👩‍👩‍👧", "שלום", "[INST]", "<", "|>"]
)
texts = st.lists(pieces, max_size=6).map("".join)
answers = texts.filter(lambda text: text.strip())
NAMES = [
    "chatml", "llama3", "mistral", "mistral_first", "mistral_legacy", "llama2", "no_end", "thinking",
    "base_without_bos", "base_with_bos",
]  # fmt: skip


def example(*turns: str, chosen: str = "yes", rejected: str = "no") -> PreferenceExample:
    roles = ("user", "assistant")
    prompt = tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns or ("Hi",)))
    return PreferenceExample(id="x", prompt=prompt, chosen=chosen, rejected=rejected)


def rendered(template, given_example: PreferenceExample, answer: str) -> str:
    """Return the expected text of the whole sequence."""
    frame = template.frame
    answer = answer.lstrip(frame.strip_left).rstrip(frame.strip_right)
    bos = template.tokenizer.decode(template._lead_ids)
    return bos + template.render(given_example.prompt) + frame.before + answer + frame.after


@pytest.mark.slow
@settings(max_examples=40)
@given(prompt=st.lists(texts, min_size=3, max_size=3), chosen=answers, rejected=answers)
def test_tokenize_decodes_to_text_with_one_end(any_tokenizer, prompt, chosen, rejected):
    template = make_template(any_tokenizer)
    given_example = example(*prompt, chosen=chosen, rejected=rejected)
    if rendered(template, given_example, chosen) == rendered(template, given_example, rejected):
        with pytest.raises(BadRow, match="equal answers"):
            template.tokenize(given_example)
        return
    pair = template.tokenize(given_example)
    prompt_ids = template.prompt_ids(given_example.prompt)
    for answer, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        assert pair.prompt_ids == prompt_ids
        assert ids[-1] == template.end_id
        assert ids.count(template.end_id) == 1
        got = any_tokenizer.decode(pair.prompt_ids + ids[:-1])
        assert squeezed(got) == squeezed(rendered(template, given_example, answer))
        special = set(any_tokenizer.all_special_ids) - {any_tokenizer.unk_token_id}
        assert not special & set(ids[:-1])
        # No turn adds control tokens to the prompt: their number is the same as with harmless turns.
        harmless = template.prompt_ids(example("a", "b", "c").prompt)
        assert [i for i in prompt_ids if i in special] == [i for i in harmless if i in special]


def squeezed(text: str) -> str:
    """Remove the space that some Metaspace tokenizers add after a control token."""
    return text.replace("s> ", "s>")


@settings(max_examples=40)
@given(prompt=texts, answer=answers)
def test_tokenize_matches_whole_conversation(any_tokenizer, prompt, answer):
    """The oracle is the encoding of the whole rendered conversation, up to the end token."""
    if not any_tokenizer.chat_template or any(text in prompt + answer for text in ["<", ">", "▁"]):
        return
    template = make_template(any_tokenizer)
    given_example = example(prompt, chosen=answer, rejected=answer + "!")
    whole = [*given_example.prompt, {"role": "assistant", "content": answer}]
    text = any_tokenizer.apply_chat_template(whole, tokenize=False)
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    pair = template.tokenize(given_example)
    mine = pair.prompt_ids + pair.chosen_ids
    if template.end_id in ids[-2:] and ids[: len(pair.prompt_ids)] == pair.prompt_ids:
        assert mine == ids[: len(mine)]
    assert any_tokenizer.decode(mine[:-1]) == any_tokenizer.decode(ids)[: len(any_tokenizer.decode(mine[:-1]))]


@pytest.mark.parametrize(
    ("name", "end", "before", "after"),
    [
        ("chatml", "<|im_end|>", "", ""),
        ("llama3", "<|eot_id|>", "", ""),
        ("mistral", "</s>", " ", ""),
        ("llama2", "</s>", " ", " "),
        ("no_end", "<|im_end|>", "", ""),
        ("thinking", "<|im_end|>", "<think>\n\n</think>\n\n", ""),
        ("base_without_bos", "<|endoftext|>", " ", ""),
        ("base_with_bos", "</s>", " ", ""),
    ],
)
def test_frame_text_around_an_answer(tokenizers, name, end, before, after):
    template = make_template(tokenizers[name])
    assert tokenizers[name].convert_ids_to_tokens(template.end_id) == end
    assert (template.frame.before, template.frame.after) == (before, after)


@pytest.mark.parametrize(
    ("name", "strip_left", "strip_right"),
    [("chatml", "", ""), ("llama3", None, None), ("llama2", None, None), ("thinking", "\n", "")],
)
def test_frame_detects_stripping(tokenizers, name, strip_left, strip_right):
    frame = make_template(tokenizers[name]).frame
    assert (frame.strip_left, frame.strip_right) == (strip_left, strip_right)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_has_one_bos_and_no_eos(tokenizers, name):
    tokenizer = tokenizers[name]
    ids = make_template(tokenizer).prompt_ids(example("Hi").prompt)
    expected = {"llama3": 1, "mistral": 1, "mistral_first": 1, "mistral_legacy": 1, "llama2": 1, "base_with_bos": 1}
    if name in expected:
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] != tokenizer.eos_token_id


def test_plain_bos_follows_the_tokenizer(fresh):
    tokenizer = fresh("llama3")
    assert PlainTemplate(tokenizer).prompt_ids(example("Hi").prompt)[0] == tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert tokenizer.bos_token_id not in PlainTemplate(tokenizer).prompt_ids(example("Hi").prompt)


def test_plain_text(tokenizers):
    template = make_template(tokenizers["chatml"], "plain")
    prompt = ({"role": "system", "content": "Be kind."}, *example("Hi", "Hello", "An egg?").prompt)
    assert template.render(prompt) == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: An egg?\n\nAssistant:"
    pair = template.tokenize(example("Hi"))
    assert tokenizers["chatml"].decode(pair.prompt_ids + pair.chosen_ids) == "User: Hi\n\nAssistant: yes<|im_end|>"


@pytest.mark.parametrize("name", ["mistral", "mistral_first", "mistral_legacy", "base_with_bos"])
def test_metaspace_adds_no_space_before_an_answer(tokenizers, name):
    tokenizer = tokenizers[name]
    pair = make_template(tokenizer).tokenize(example("Hi", chosen="egg", rejected=" egg"))
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids)[0].startswith("▁e")
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids).endswith((" [/INST] egg</s>", "Assistant: egg</s>"))
    assert tokenizer.decode(pair.prompt_ids + pair.rejected_ids).endswith((" [/INST]  egg</s>", "Assistant:  egg</s>"))


def test_answer_merging_with_prompt_is_separate(fresh):
    """The newline at the end of the prompt would merge with the newline at the start of the answer."""
    tokenizer = fresh("chatml")
    assert len(tokenizer.encode("\n\n")) == 1
    template = make_template(tokenizer)
    pair = template.tokenize(example("Hi", chosen="\negg"))
    assert pair.prompt_ids == template.prompt_ids(example("Hi").prompt)
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids)[0] == "Ċ"


def test_merge_across_boundary_without_space(fresh):
    tokenizer = fresh("mistral")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ ' ' + message", "{{ message").replace(
        " [/INST]", " he"
    )
    template = make_template(tokenizer)
    joint = tokenizer.encode("<s>[INST] Hi hello", add_special_tokens=False)
    prompt = template.prompt_ids(example("Hi").prompt)
    assert joint[: len(prompt)] != prompt
    pair = template.tokenize(example("Hi", chosen="llo"))
    assert not tokenizer.convert_ids_to_tokens(pair.chosen_ids)[0].startswith("▁")
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids).endswith("Hi hello</s>")


def test_unigram_end_token_piece_remains_text(unigram_tokenizer):
    pair = make_template(unigram_tokenizer).tokenize(example("egg </s>", chosen="an </s> egg", rejected="no"))
    assert pair.chosen_ids.count(unigram_tokenizer.eos_token_id) == 1
    assert unigram_tokenizer.eos_token_id not in pair.prompt_ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["", " ", "\n\t ", "\u2003"])
def test_empty_answers(tokenizers, name, answer):
    with pytest.raises(BadRow) as caught:
        make_template(tokenizers[name]).tokenize(example("Hi", rejected=answer))
    assert caught.value.reason == "empty answer"


@pytest.mark.parametrize("name", ["chatml", "mistral", "llama2", "base_without_bos"])
def test_answer_without_tokens_is_empty(fresh, name):
    from tokenizers import normalizers

    tokenizer = fresh(name)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(BadRow) as caught:
        make_template(tokenizer).tokenize(example("Hi", chosen="\u200b"))
    assert caught.value.reason == "empty answer"


def test_answer_normalized_to_end_token_is_bad(fresh):
    from tokenizers import AddedToken, normalizers

    tokenizer = fresh("no_end")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([AddedToken("<stop>", special=True, normalized=True)])
    tokenizer.eos_token = "<stop>"
    template = make_template(tokenizer)
    with pytest.raises(BadRow) as caught:
        template.tokenize(example("Hi", chosen="a \uff1cstop\uff1e b"))
    assert caught.value.reason == "end token in answer"


def test_answers_equal_after_stripping_are_bad(tokenizers):
    with pytest.raises(BadRow) as caught:
        make_template(tokenizers["llama3"]).tokenize(example("Hi", chosen="yes", rejected=" yes "))
    assert caught.value.reason == "equal answers"


def test_conversation_refused_by_template_is_bad(tokenizers):
    with pytest.raises(BadRow, match="refused by the chat template: Conversation roles must alternate"):
        make_template(tokenizers["mistral"]).prompt_ids([{"role": "system", "content": "Be kind."}])


def test_auto_template_prefers_chat(tokenizers):
    assert make_template(tokenizers["chatml"]).kind == "chat"
    assert make_template(tokenizers["base_with_bos"]).kind == "plain"
    assert make_template(tokenizers["chatml"], "plain").kind == "plain"
    with pytest.raises(DataError, match=r"no chat template\. Use the plain template"):
        make_template(tokenizers["base_with_bos"], "chat")
    with pytest.raises(DataError, match=r"data\.template: found 'chatml', expected one of auto, chat, plain"):
        make_template(tokenizers["chatml"], "chatml")


def test_tokenizer_without_end_token_is_refused(fresh):
    tokenizer = fresh("no_end")
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no token that ends an answer.*tokenizer\.eos_token"):
        make_template(tokenizer)
    tokenizer = fresh("chatml")
    tokenizer.eos_token = None
    make_template(tokenizer)


def test_pad_id_defaults_to_end_token(tokenizers):
    assert make_template(tokenizers["llama3"]).pad_id == make_template(tokenizers["llama3"]).end_id
    assert make_template(tokenizers["chatml"]).pad_id == tokenizers["chatml"].pad_token_id


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ raise_exception('no') }}", "rejects a user turn followed by an assistant turn: no"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "omits the text of an assistant turn"),
    ],
)
def test_unusable_chat_template_is_refused(fresh, chat_template, message):
    tokenizer = fresh("chatml")
    tokenizer.chat_template = chat_template
    with pytest.raises(DataError, match=message):
        ChatTemplate(tokenizer)


def test_generation_prompt_mismatch_is_logged(fresh, caplog):
    tokenizer = fresh("chatml")
    tokenizer.name_or_path = "mismatch"  # a name is reported once in a process, and other tests use this tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n'", "assistant\n<think>\n'")
    with caplog.at_level(logging.WARNING):
        template = make_template(tokenizer)
        make_template(tokenizer)
    (message,) = caplog.messages
    assert "are appended to the generation prompt" in message
    assert "set data.template_kwargs" in message
    assert template.frame.before == ""
    assert tokenizer.decode(template.prompt_ids(example("Hi").prompt)).endswith("assistant\n<think>\n")


def test_fingerprint_changes_with_the_ids(fresh):
    def of(name: str, change=lambda tokenizer: None, kind: str = "auto") -> str:
        tokenizer = fresh(name)
        change(tokenizer)
        return make_template(tokenizer, kind).fingerprint

    def other_template(tokenizer):
        tokenizer.chat_template += " "

    def used_with_padding(tokenizer):
        tokenizer(["a", "b c d"], padding="max_length", max_length=8, truncation=True)

    assert of("chatml") == of("chatml", used_with_padding)
    different = [
        of("chatml"),
        of("chatml", kind="plain"),
        of("chatml", other_template),
        of("chatml", lambda tokenizer: tokenizer.add_tokens(["omelette"])),
        of("chatml", lambda tokenizer: setattr(tokenizer, "bos_token", "<|endoftext|>")),
        of("llama3"),
    ]
    assert len(set(different)) == len(different)


def test_tokenize_keeps_labels(tokenizers):
    given_example = PreferenceExample(
        "7", example("Hi").prompt, "yes", "no", "s", "f", "a", flipped=True, has_gold=True
    )
    pair = make_template(tokenizers["chatml"]).tokenize(given_example)
    labels = (pair.id, pair.source, pair.factor, pair.annotator, pair.flipped, pair.has_gold)
    assert labels == ("7", "s", "f", "a", True, True)
