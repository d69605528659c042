"""A context manager for evaluating a model during training without side effects."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lpc_lightning.policy.eval_mode import eval_mode

TOKENIZER_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "pad_token")


@contextmanager
def preserved(module: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
    """Restore the state of training after the block, also if the block raises.

    Restored are: train or eval mode of every submodule, `requires_grad` of every parameter, gradients, random states,
    whether gradients are enabled, environment variables, logger levels, and the tokenizer's settings. CUDA's cached
    memory is released.

    Inside the block, the model is in eval mode, parameters have no gradients, and gradients are disabled. Weights are
    not restored.

    Args:
        module: The model.
        tokenizer: The model's tokenizer. HFLM pads on the left, and sets a padding token if there is none.
    """
    with ExitStack() as stack:
        stack.enter_context(_memory())
        stack.enter_context(_random_states())
        stack.enter_context(_environment())
        stack.enter_context(_logging_levels())
        stack.enter_context(eval_mode(module))
        stack.enter_context(_gradients(module))
        if tokenizer is not None:
            stack.enter_context(_tokenizer_settings(tokenizer))
        yield


@contextmanager
def _memory() -> Iterator[None]:
    try:
        yield
    finally:
        if torch.cuda.is_initialized():
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def _random_states() -> Iterator[None]:
    """Restore all random states: lm-eval seeds the generators, and text generation draws from them."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


@contextmanager
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _logging_levels() -> Iterator[None]:
    loggers = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    before = [(logger, logger.level) for logger in loggers]
    try:
        yield
    finally:
        for logger, level in before:
            if logger.level != level:
                logger.setLevel(level)


@contextmanager
def _gradients(module: nn.Module) -> Iterator[None]:
    """Detach the gradient tensors from their parameters, so that the block cannot add to them."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    for parameter, _, _ in before:
        parameter.grad = None
    enabled = torch.is_grad_enabled()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_grad_enabled(enabled)
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient


@contextmanager
def _tokenizer_settings(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    before = {name: getattr(tokenizer, name) for name in TOKENIZER_SETTINGS}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(tokenizer, name, value)
