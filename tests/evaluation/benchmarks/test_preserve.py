"""Tests of `preserved`: all state that an evaluation may change is restored, however the block ends."""

from __future__ import annotations

import logging
import os
import random

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from torch import nn

from lpc_lightning.algorithms import DPO
from lpc_lightning.evaluation.benchmarks.preserve import preserved
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from lpc_lightning.latent import GumbelSpace
from lpc_lightning.policy import TinyPolicy

LOGGERS = ("", "lm_eval", "lm_eval.evaluator", "transformers")


class StopError(Exception):
    pass


@pytest.fixture
def module() -> DPO:
    """Module during training: modes are mixed, some parameters are frozen, and some have gradients."""
    built = DPO(
        policy=TinyPolicy(width=16, layers=2, heads=2, context=1024),
        latent=GumbelSpace(num_codes=4, init_logit_std=0.5),
    )
    built.configure_model()
    built.train()
    layers = [part for part in built.policy.modules() if isinstance(part, nn.Linear)]
    layers[0].eval()
    layers[1].weight.requires_grad_(False)
    for layer in layers[2:4]:
        layer.weight.grad = torch.randn_like(layer.weight)
    return built


def state(module, tokenizer):
    """Return all state by value."""
    return {
        "modes": {name: part.training for name, part in module.named_modules()},
        "frozen": {name: parameter.requires_grad for name, parameter in module.named_parameters()},
        "gradients": {
            name: None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
            for name, parameter in module.named_parameters()
        },
        "weights": {name: parameter.tolist() for name, parameter in module.named_parameters()},
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "gradients on": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "levels": {name: logging.getLogger(name).level for name in LOGGERS},
        "tokenizer": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length,
                      tokenizer.pad_token, tokenizer.pad_token_id),
    }  # fmt: skip


def disturb(module, tokenizer):
    """Change all state except the weights."""
    module.eval()
    for index, parameter in enumerate(module.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        if parameter.grad is not None:
            parameter.grad.zero_()
        parameter.grad = torch.ones_like(parameter)
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    torch.set_grad_enabled(True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["KEPT"] = "changed"
    del os.environ["REMOVED"]
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length = "left", "left", 3
    tokenizer.pad_token = tokenizer.eos_token


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, StopError, KeyboardInterrupt])
def test_preserved_restores_state(enabled, error, module, monkeypatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    monkeypatch.setenv("KEPT", "value")
    monkeypatch.setenv("REMOVED", "value")
    tokenizer = module.tokenizer

    def block():
        with preserved(module, tokenizer):
            disturb(module, tokenizer)
            if error:
                raise error

    with torch.set_grad_enabled(enabled):
        before = state(module, tokenizer)
        if error:
            with pytest.raises(error):
                block()
        else:
            block()
        assert state(module, tokenizer) == before


def test_disturb_changes_all_but_weights(module, monkeypatch) -> None:
    """Check that the test above can fail for each part of the state."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")
    monkeypatch.setenv("KEPT", "value")
    monkeypatch.setenv("REMOVED", "value")
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    random.seed(4)  # an earlier test may have left the seed of `disturb`
    np.random.seed(4)
    with torch.no_grad():
        before = state(module, module.tokenizer)
        disturb(module, module.tokenizer)
        after = state(module, module.tokenizer)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    assert {name for name in before if before[name] == after[name]} == {"weights"}


def test_preserved_block_has_no_gradients(module) -> None:
    with preserved(module):
        assert all(parameter.grad is None for parameter in module.parameters())
        assert not (module.policy.head.weight.sum() * 2).requires_grad


def test_preserved_continues_random_numbers(module) -> None:
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    expected = [draw(), draw()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    actual = [draw()]
    with preserved(module):
        torch.manual_seed(0)
        draw()
    assert [*actual, draw()] == expected


@pytest.mark.slow
def test_preserved_around_real_benchmark(module, data_dir) -> None:
    tokenizer = module.tokenizer
    before = state(module, tokenizer)
    with preserved(module, tokenizer):
        lm = HFLM(pretrained=module.policy.causal_lm, tokenizer=tokenizer, batch_size=2)
        actual = run_benchmarks(lm, ["arc_easy", "gsm8k"], data_dir=str(data_dir), limit=2)
        assert not actual.failures
        assert not module.policy.causal_lm.training
        assert torch.get_rng_state().tolist() != before["torch"]
    assert state(module, tokenizer) == before
