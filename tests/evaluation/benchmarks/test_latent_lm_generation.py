"""Tests of text generation with LatentLM, against stock HFLM at z = 0, and a naive loop without a cache under z."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.inference.modeling_lpc import InferencePrior
from lpc_lightning.policy import CausalPolicy
from lpc_lightning.seeding import derive
from tests.evaluation.benchmarks.token_scores import SEED, WIDTH, WINDOW, Build, make_prior

NEW = 12
PROMPTS = [
    "Question: What do you do when a friend asks for help?\nAnswer:",
    "Hello",
    "It was raining all day, and ",
    "You asked me about the weather, and I said that it was raining. " * 8,
    "A",
]
"""Prompts of different lengths, so that batches have padding. One is longer than the window."""


def instances(prompts: Sequence[str], **options: Any) -> list[Instance]:
    settings = {"max_gen_toks": NEW} | options
    return [Instance("generate_until", {}, (prompt, dict(settings)), n) for n, prompt in enumerate(prompts)]


@torch.no_grad()
def decode_naively(
    policy: CausalPolicy, tokenizer: PreTrainedTokenizerBase, prompt: str, prior: InferencePrior, mode: str | int
) -> str:
    """Decode a prompt greedily. The whole sequence is read again for each token."""
    model = policy.causal_lm
    tokens = tokenizer.encode(prompt)[-(WINDOW - NEW) :]
    start, z = len(tokens), None
    while len(tokens) < start + NEW and (len(tokens) == start or tokens[-1] != tokenizer.eos_token_id):
        states = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1]
        if z is None:
            torch.manual_seed(derive(SEED, *tokens))
            z = prior(states[None], mode)[0]
        tokens.append(int(model.get_output_embeddings()(states + z).argmax()))
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize("prior", [None, make_prior(0.0)], ids=["no prior", "z = 0"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_text_at_zero_z_equals_stock(
    family: str,
    prior: InferencePrior | None,
    precision: torch.dtype | None,
    policies: Build,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "mixed_precision_dtype": precision}
    stock = HFLM(policies(family).causal_lm, tokenizer=tokenizer, **options)
    ours = LatentLM(policies(family), tokenizer, prior, **options)
    for settings in ({"until": ["\n"]}, {"do_sample": True, "temperature": 1.0}):
        torch.manual_seed(0)
        expected = stock.generate_until(instances(PROMPTS, **settings))
        torch.manual_seed(0)
        assert ours.generate_until(instances(PROMPTS, **settings)) == expected
        assert any(expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
@pytest.mark.parametrize("mode", ["mean", "argmax", 3, "sample"])
def test_text_under_z_equals_naive_loop(
    family: str, mode: str | int, policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    policy, prior = policies(family), make_prior(2.0)
    expected = [decode_naively(policy, tokenizer, prompt, prior, mode) for prompt in PROMPTS]
    plain = [decode_naively(policy, tokenizer, prompt, make_prior(0.0), mode) for prompt in PROMPTS]
    assert expected != plain
    for batch_size in (1, 2, 16):
        lm = LatentLM(policy, tokenizer, prior, prior_mode=mode, batch_size=batch_size, seed=SEED)
        assert lm.generate_until(instances(PROMPTS)) == expected
    order = list(range(len(PROMPTS)))
    random.Random(1).shuffle(order)
    lm = LatentLM(policy, tokenizer, prior, prior_mode=mode, batch_size=3, seed=SEED)
    assert lm.generate_until(instances([PROMPTS[n] for n in order])) == [expected[n] for n in order]


def test_text_of_padded_float64_batches(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    """The family's own formula has a softmax in float32, in which the lowest float64 is -inf."""
    policy, prior = policies("gemma2", "float64"), make_prior(2.0).double()
    for used, naive in ((prior, prior), (None, make_prior(0.0).double())):
        expected = [decode_naively(policy, tokenizer, prompt, naive, "mean") for prompt in PROMPTS[:3]]
        assert LatentLM(policy, tokenizer, used, batch_size=3).generate_until(instances(PROMPTS[:3])) == expected


def test_text_ends_before_stop_string(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prior = policies("llama"), make_prior(2.0)
    whole = [decode_naively(policy, tokenizer, prompt, prior, "mean") for prompt in PROMPTS]
    until = [whole[0][3:5], whole[2][4:6]]
    assert all(len(stop) == 2 for stop in until)
    expected = [text[: min([text.find(stop) for stop in until if stop in text] or [len(text)])] for text in whole]
    assert expected != whole
    lm = LatentLM(policy, tokenizer, prior, batch_size=4)
    assert lm.generate_until(instances(PROMPTS, until=until)) == expected


def test_beams_share_z_of_prompt(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    """Without a soft cap, z is a bias of the logits. Compare with stock beam search with this bias."""
    policy, prior = policies("llama"), make_prior(2.0)
    lm = LatentLM(policy, tokenizer, prior, prior_mode=1, batch_size=3)
    actual = lm.generate_until(instances(PROMPTS[:3], num_beams=3))
    head = policy.causal_lm.get_output_embeddings()
    biased = torch.nn.Linear(WIDTH, head.out_features)
    biased.weight = head.weight
    with torch.no_grad():
        biased.bias = torch.nn.Parameter(head(prior.codebook[1]))
        policy.causal_lm.set_output_embeddings(biased)
        try:
            stock = HFLM(policy.causal_lm, tokenizer=tokenizer, batch_size=3)
            expected = stock.generate_until(instances(PROMPTS[:3], num_beams=3))
        finally:
            policy.causal_lm.set_output_embeddings(head)
    assert actual == expected
    assert actual != HFLM(policy.causal_lm, tokenizer=tokenizer).generate_until(instances(PROMPTS[:3], num_beams=3))


def test_model_is_plain_policy_after_generation(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior(2.0))
    lm.generate_until(instances(PROMPTS[:1]))
    assert lm.model is policies("llama").causal_lm


def test_auto_batch_size_on_cpu(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    policy, prior = policies("llama"), make_prior(2.0)
    lm = LatentLM(policy, tokenizer, prior, batch_size="auto", max_batch_size=3)
    assert lm.generate_until(instances(PROMPTS)) == [
        decode_naively(policy, tokenizer, prompt, prior, "mean") for prompt in PROMPTS
    ]
