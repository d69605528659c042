"""Tests of supported heads, and of errors for heads whose logits differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
)
from transformers.masking_utils import sdpa_mask

from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.policy import CausalPolicy
from lpc_lightning.policy.head import head_of


class ScaledLlama(LlamaForCausalLM):
    """A family that scales its logits without a config field for it."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        output = super().forward(*inputs, **options)
        output.logits = output.logits * 1.5
        return output


class ShiftedLlama(LlamaForCausalLM):
    """A family that adds a constant to the logits of a few tokens, which changes the softmax."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        output = super().forward(*inputs, **options)
        output.logits = torch.cat([output.logits[..., :-3], output.logits[..., -3:] + 0.5], dim=-1)
        return output


class DeepHeadLlama(LlamaForCausalLM):
    """A head of two layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = nn.Sequential(nn.Linear(config.hidden_size, config.vocab_size), nn.Tanh())


def config(family: str = "llama", **options: Any) -> Any:
    size = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    size |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(family, **(size | options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_head_in_every_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    CausalPolicy(AutoModelForCausalLM.from_config(config(), dtype=dtype))


@pytest.mark.parametrize("model", [ScaledLlama, ShiftedLlama])
def test_changed_logits_are_refused(model: type[LlamaForCausalLM]) -> None:
    torch.manual_seed(0)
    built = model(config())
    with pytest.raises(UnsupportedPolicyError, match=f"the logits of {model.__name__} are .* away from LMHead"):
        CausalPolicy(built)


def test_nonlinear_head_is_refused() -> None:
    with pytest.raises(UnsupportedPolicyError, match="found DeepHeadLlama with Sequential as its output layer"):
        CausalPolicy(DeepHeadLlama(config()))


@pytest.mark.parametrize(
    ("family", "options", "scale", "softcap", "bias"),
    [
        ("llama", {}, 1.0, None, False),
        ("cohere", {"logit_scale": 0.25}, 0.25, None, False),
        ("granite", {"logits_scaling": 8.0}, 0.125, None, False),
        ("phi", {}, 1.0, None, True),
        ("gemma2", {"final_logit_softcapping": 7.0, "head_dim": 8}, 1.0, 7.0, False),
        ("falcon_h1", {"lm_head_multiplier": 2.0, "mamba_d_ssm": 32, "mamba_n_heads": 4}, 2.0, None, False),
    ],
)
def test_head_of_every_family(
    family: str, options: dict[str, Any], scale: float, softcap: float | None, bias: bool
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family, **options))
    head = head_of(model)
    assert (head.scale, head.softcap, head.bias is not None) == (scale, softcap, bias)
    assert head.weight is model.get_output_embeddings().weight
    CausalPolicy(model)


def flash_attention_of_tests(*inputs: Any, **options: Any) -> Any:
    raise RuntimeError("FlashAttention only supports fp16 and bf16 on a GPU.")


def test_head_is_checked_without_flash_attention() -> None:
    kernel = "flash_attention_of_tests"
    AttentionInterface.register(kernel, flash_attention_of_tests)
    AttentionMaskInterface.register(kernel, sdpa_mask)
    config = AutoConfig.for_model("llama", vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = kernel
    policy = CausalPolicy(model)
    assert model.config._attn_implementation == kernel
    assert not policy.takes_block_mask
    with pytest.raises(RuntimeError, match="FlashAttention"):
        model(torch.arange(4)[None])
