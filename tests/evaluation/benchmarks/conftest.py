"""Tiny policies of every family, each built once, and their tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from lpc_lightning.policy import CausalPolicy
from tests.evaluation.benchmarks.token_scores import WINDOW, Build


@pytest.fixture(scope="session")
def tokenizer(tiny_spec: Build) -> PreTrainedTokenizerBase:
    return tiny_spec("llama").load_tokenizer()


@pytest.fixture(scope="session")
def policies(tiny: Build) -> Callable[..., CausalPolicy]:
    built: dict[tuple[str, str], CausalPolicy] = {}

    def policy(family: str, dtype: str = "float32") -> CausalPolicy:
        if (family, dtype) not in built:
            built[family, dtype] = tiny(family, dtype=dtype, context=WINDOW)
        return built[family, dtype]

    return policy
