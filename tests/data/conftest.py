"""Small tokenizers like those of chat models, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' + message['content'].lstrip('\n') }}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = [
    "Name three ways to cook an egg.\n\nHere are three ways:\n1. Boil it.\n2. Fry it.\n3. Poach it.",
    "user system assistant\n[INST] hello there [/INST] hello to you too </s>",
    "User: what is the answer?\n\nAssistant: the answer is 42.\n\nSystem: be kind.",
    "No, sorry! I can not do that for you. What else can I do?  \n\n\n  two spaces\n",
] * 4


def byte_level(special: Iterable[str], plain_added: Iterable[str] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain_added])
    return tokenizer


def metaspace(prepend_scheme: str = "always") -> Tokenizer:
    """Build a BPE with byte fallback and Metaspace, like a converted SentencePiece model. `legacy`: in a normalizer."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    trained.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    model = json.loads(trained.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend_scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def unigram() -> Tokenizer:
    """Build a Unigram model whose vocabulary has the piece "</s>", like T5."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def add_bos(tokenizer: Tokenizer, bos: str, eos: str | None = None) -> Tokenizer:
    pairs = [(text, tokenizer.token_to_id(text)) for text in (bos, eos) if text]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}" if eos else f"{bos} $A", special_tokens=pairs
    )
    return tokenizer


def wrapped(tokenizer: Tokenizer, chat_template: str | None = None, **special: Any) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    fast.chat_template = chat_template
    return fast


def chatml(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Build a tokenizer like SmolLM2: the bos token begins a turn, and no bos is added."""
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return wrapped(tokenizer, template, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")


def llama3() -> PreTrainedTokenizerFast:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = add_bos(byte_level(special), "<|begin_of_text|>")
    return wrapped(tokenizer, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def mistral(prepend_scheme: str = "always") -> PreTrainedTokenizerFast:
    tokenizer = add_bos(metaspace(prepend_scheme), "<s>")
    return wrapped(tokenizer, MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama2() -> PreTrainedTokenizerFast:
    tokenizer = add_bos(metaspace("first"), "<s>", "</s>")
    return wrapped(tokenizer, LLAMA2, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def base_without_bos() -> PreTrainedTokenizerFast:
    """Build a tokenizer like GPT-2."""
    return wrapped(byte_level(["<|endoftext|>"]), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def base_with_bos() -> PreTrainedTokenizerFast:
    """Build a tokenizer like Llama 2 without a chat template. Its post-processor also adds an eos."""
    return wrapped(add_bos(metaspace("first"), "<s>", "</s>"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unnamed_markers() -> PreTrainedTokenizerFast:
    """Build a tokenizer with ChatML markers as plain added tokens, like some fine-tuned models, and with <think>."""
    tokenizer = byte_level(["<|endoftext|>"], plain_added=["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    return wrapped(tokenizer, THINKING, eos_token="<|endoftext|>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": chatml,
    "llama3": llama3,
    "mistral": mistral,
    "mistral_first": lambda: mistral("first"),
    "mistral_legacy": lambda: mistral("legacy"),
    "llama2": llama2,
    "no_end": lambda: chatml(NO_END),
    "thinking": unnamed_markers,
    "base_without_bos": base_without_bos,
    "base_with_bos": base_with_bos,
}


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    """Return all tokenizers by name. They are shared, so tests must not change them."""
    return {name: build() for name, build in TOKENIZERS.items()}


@pytest.fixture
def fresh() -> Callable[[str], PreTrainedTokenizerFast]:
    """Return a function that builds a tokenizer by name. Tests may change the tokenizer."""
    return lambda name: TOKENIZERS[name]()


@pytest.fixture(scope="session")
def unigram_tokenizer() -> PreTrainedTokenizerBase:
    return wrapped(unigram(), bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session", params=list(TOKENIZERS))
def any_tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> PreTrainedTokenizerBase:
    return tokenizers[request.param]


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows (objects or lines) to a JSON lines file and returns its path."""

    def write(rows: Iterable[dict[str, Any] | str], name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write
