"""Dropout of a config inside a config, as models of text and pictures have it: off in training, back in an export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from lpc_lightning.algorithms import DPO
from lpc_lightning.data.batching.layouts import PaddedLayout
from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.inference.export import plain_model
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.types import TokenizedPair

TEXT: dict[str, Any] = {
    **{"vocab_size": 1024, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "attention_dropout": 0.25},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
PICTURES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": PICTURES | {"image_size": 28, "patch_size": 14, "attention_dropout": 0.5}},
    "emu3": {},
}
"""Families whose causal LM is the whole model, or the text model alone."""


class NestedPolicy(TinyPolicy):
    """A tiny policy whose text model has a config of its own."""

    def load_config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.family, text_config=TEXT, **CONFIGS[self.family])


every_family = pytest.mark.parametrize("family", CONFIGS)


@every_family
@torch.no_grad()
def test_nested_dropout_is_off(
    family: Any, make_pairs: Callable[..., list[TokenizedPair]], naive_logps: Callable[..., Tensor]
) -> None:
    pairs = make_pairs([(5, 3, 7), (11, 9, 1)])
    spec = NestedPolicy(family)
    policy = spec.build()
    assert policy.training
    expected = naive_logps(spec.load_model(spec.load_config(), torch.float32).eval(), pairs)
    torch.testing.assert_close(policy(PaddedLayout(0)(pairs)).logps().double(), expected, rtol=0, atol=2e-4)


@every_family
def test_export_has_nested_dropout(family: Any) -> None:
    module = DPO(policy=NestedPolicy(family), reference="live")
    module.configure_model()
    config = plain_model(module, make_template(module.tokenizer)).config.to_dict()
    assert config.get("text_config", config)["attention_dropout"] == 0.25
    assert config.get("vision_config", {"attention_dropout": 0.5})["attention_dropout"] == 0.5
