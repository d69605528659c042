"""Tests of the settings of LatentLM, of its attributes for lm-eval, and of what it logs and leaves unchanged."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from torch import nn
from transformers import PreTrainedTokenizerBase

from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.latent_lm import LatentLM
from lpc_lightning.types import Message
from tests.evaluation.benchmarks.token_scores import (
    CODES,
    TEXTS,
    WINDOW,
    Build,
    instances,
    make_prior,
    shared_or_not,
    texts,
)


def count_hooks(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in model.modules()]


def test_policy_and_tokenizer_are_unchanged(tiny: Build, tiny_spec: Build) -> None:
    policy, tokenizer = tiny("llama", dtype="float32"), tiny_spec("llama").load_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    identities = {name: id(parameter) for name, parameter in policy.named_parameters()}
    hooks_before = count_hooks(policy)
    lm = LatentLM(policy, tokenizer, make_prior())
    lm.loglikelihood(texts())
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("A text.",)]))
    lm.generate_until(instances("generate_until", [("A", {"until": ["."], "max_gen_toks": 2})]))
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert {name: id(parameter) for name, parameter in policy.named_parameters()} == identities
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())
    assert count_hooks(policy) == hooks_before


def test_log_warns_about_truncation_only(
    policies: Build, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    lm = LatentLM(policies("llama"), tokenizer, make_prior())
    assert not caplog.records
    lm.loglikelihood(texts())
    messages = [
        record.message for record in caplog.records if record.name.startswith(("lpc_lightning.evaluation", "lm_eval"))
    ]
    assert messages == [
        "2 of 10 requests are longer than the policy's window of 64 tokens. "
        "The first tokens of their contexts are removed."
    ]


def test_progress_bar_counts_requests(
    policies: Build, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior())
    lm.loglikelihood(texts())
    output = capfd.readouterr().err
    assert "Running loglikelihood requests: 100%" in output
    assert "10/10" in output
    lm.loglikelihood(texts(), disable_tqdm=True)
    assert not capfd.readouterr().err


@shared_or_not
def test_answers_are_added_to_lm_eval_cache(share: bool, policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior(), share_contexts=share)
    cached = {}

    class Hook:
        def add_partial(self, kind: str, arguments: Any, answer: Any) -> None:
            cached[kind, arguments] = answer

    lm.set_cache_hook(Hook())
    answers = lm.loglikelihood(texts())
    assert cached == {("loglikelihood", args): answer for args, answer in zip(TEXTS, answers, strict=True)}


@pytest.mark.parametrize("setting", [{"batch_size": 0}, {"batch_size": "some"}, {"prior_mode": CODES}])
def test_latent_lm_rejects_invalid_settings(
    setting: dict[str, Any], policies: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}: found {setting[name]!r}, expected"):
        LatentLM(policies("llama"), tokenizer, make_prior(), **setting)


def test_latent_lm_attributes_for_lm_eval(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    lm = LatentLM(policies("llama"), tokenizer, make_prior(mode="argmax"))
    stock = HFLM(policies("llama").causal_lm, tokenizer=tokenizer)
    assert lm.get_model_info() == stock.get_model_info()
    history = [{"role": "user", "content": "Hello"}]
    assert lm.apply_chat_template(history) == stock.apply_chat_template(history)
    assert lm.chat_template(True) == stock.chat_template(True) == tokenizer.chat_template
    assert lm.tokenizer_name == stock.tokenizer_name
    assert (lm.rank, lm.world_size, lm.max_length) == (0, 1, WINDOW)
    assert lm.prior_mode == "argmax"
    assert LatentLM(policies("llama"), tokenizer).prior_mode is None


def test_latent_lm_renders_the_template_of_training(policies: Build, tokenizer: PreTrainedTokenizerBase) -> None:
    """lm-eval's prompt is the trained prompt: the template gets the arguments, and the day of training."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        "{{ strftime_now('%Y') }}{% if quiet %}Be quiet. {% endif %}{{ messages[0].content }}: "
        "{% if messages | length > 1 %}{{ messages[1].content }}{% endif %}"
    )
    template = make_template(dated, "chat", {"quiet": True})
    lm = LatentLM(policies("llama"), dated, template=template)
    assert lm.apply_chat_template([{"role": "user", "content": "Hello"}]) == "2024Be quiet. Hello: "
    assert template.render([Message(role="user", content="Hello")]) == "2024Be quiet. Hello: "
    assert lm.chat_template_args == {"quiet": True}
    assert LatentLM(policies("llama"), dated, template=make_template(dated, "plain")).chat_template_args == {}
