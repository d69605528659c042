"""Tests of families of causal LMs: log-probabilities and gradients against the plain model of transformers.

The plain model has the family's own attention formula, and computes one sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.policy import CausalPolicy, TinyPolicy
from lpc_lightning.policy.attention_kernel import check_kernel
from lpc_lightning.types import TokenizedPair

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """Fields of a family's config besides `SIZES` (None: no such field), and what `attention: auto` is for it."""

    options: dict[str, Any] = field(default_factory=dict)
    kernel: str = "segment"
    packs: bool = True


FAMILIES = {
    "llama": Family(),
    "qwen2": Family({"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": Family(),
    "qwen3_moe": Family({"num_experts": 4, **EXPERTS}),
    "mistral": Family({"sliding_window": 5}),
    "mixtral": Family({"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "gemma": Family(),
    "gemma2": Family({"sliding_window": 5, "attn_logit_softcapping": 1.0}, kernel="eager"),
    "gemma3_text": Family({"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": Family(),
    "phi3": Family({"sliding_window": 5}),
    "olmo2": Family(),
    "gpt2": Family(),
    "gpt_neox": Family(),
    "opt": Family({"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "stablelm": Family(),
    "cohere": Family({"logit_scale": 0.25}),
    "granite": Family({"logits_scaling": 4.0}),
    "smollm3": Family(),
    "gpt_oss": Family({"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}, kernel="eager"),
    "falcon": Family({"head_dim": None}, kernel="eager"),
    "gptj": Family({"rotary_dim": 4}, kernel="eager"),
    "codegen": Family({"rotary_dim": 4, "num_attention_heads": 4}, kernel="eager"),
    "xglm": Family({"ffn_dim": 32}, kernel="eager"),
    "deepseek_v32": Family(
        {
            **EXPERTS,
            "num_key_value_heads": 2,
            "head_dim": None,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "index_topk": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
        },
        kernel="eager",
        packs=False,
    ),
    # Attention in windows of its own, biases by distance in the row, or recurrent layers.
    "gpt_neo": Family({"attention_types": [[["global", "local"], 1]], "window_size": 24}, kernel="eager", packs=False),
    "bloom": Family(kernel="eager", packs=False),
    "mpt": Family(kernel="eager", packs=False),
    "lfm2": Family({"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}, packs=False),
    # A window in the config, which the family does not apply.
    "moshi": Family({"sliding_window": 30, "ffn_dim": 32}, packs=False),
    "mamba": Family({"state_size": 4}, kernel="eager", packs=False),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


class FamilyPolicy(TinyPolicy):
    """A tiny policy of any family."""

    def load_config(self) -> PreTrainedConfig:
        fields = {name: value for name, value in (SIZES | self.options).items() if value is not None}
        return AutoConfig.for_model(self.family, **fields)


def spec_of(name: str, **settings: Any) -> FamilyPolicy:
    return FamilyPolicy(name, options=FAMILIES[name].options, **settings)  # type: ignore[arg-type]


def build(spec: FamilyPolicy, perturb: Callable[..., None]) -> tuple[CausalPolicy, PreTrainedModel]:
    """Build a policy, and the plain model with equal weights."""
    policy, config = spec.build(), spec.load_config()
    config._attn_implementation = "eager"
    plain = spec.load_model(config, torch.float32).eval()
    perturb(policy)
    perturb(plain)
    return policy, plain


def gradients(logps: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradients of a sum of log-probabilities with different signs, as in a preference loss."""
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = (torch.linspace(-1, 1, len(logps), dtype=logps.dtype) * logps).sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True))


@every_family
def test_family_equals_plain_model(
    name: str,
    make_pairs: Callable[..., list[TokenizedPair]],
    naive_logps: Callable[..., Tensor],
    perturb: Callable[..., None],
) -> None:
    pairs = make_pairs([(5, 3, 7), (11, 9, 1)])
    policy, plain = build(spec_of(name), perturb)
    family = FAMILIES[name]
    assert policy.backbone.config._attn_implementation == family.kernel
    assert policy.takes_block_mask == family.packs
    expected = naive_logps(plain, pairs)
    exact = gradients(expected, plain)
    largest = max(float(gradient.norm()) for gradient in exact.values())
    layouts: list[Layout] = [PaddedLayout(0), *([SharedPrefixLayout(0, 10_000)] if family.packs else [])]
    for layout in layouts:
        logps = policy(layout(pairs)).logps()
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=2e-4)
        for part, gradient in gradients(logps, policy.causal_lm).items():
            assert (gradient - exact[part]).norm() <= 1e-4 * exact[part].norm() + 1e-5 * largest, part


RANDOM = {
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3, "sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.3, "sliding_window": None},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.9, "dropout": 0.5},
}
"""Families that choose experts, or drop layers, at random in training mode."""


@pytest.mark.parametrize("name", RANDOM)
@torch.no_grad()
def test_training_mode_draws_no_numbers(
    name: Any,
    make_pairs: Callable[..., list[TokenizedPair]],
    naive_logps: Callable[..., Tensor],
    perturb: Callable[..., None],
) -> None:
    pairs = make_pairs([(5, 3, 7), (11, 9, 1)])
    policy, plain = build(FamilyPolicy(name, options=RANDOM[name]), perturb)
    assert policy.training
    expected = naive_logps(plain, pairs)
    for _ in range(2):
        torch.testing.assert_close(policy(PaddedLayout(0)(pairs)).logps().double(), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("bloom", "sdpa"),
        ("codegen", "segment"),
        ("falcon", "segment"),
        ("falcon", "flex_attention"),
        ("gemma2", "sdpa"),
        ("gpt_neo", "sdpa"),
        ("gpt_oss", "segment"),
        ("mamba", "sdpa"),
        ("xglm", "flash_attention_2"),
    ],
)
def test_kernel_that_a_family_lacks_is_refused(name: str, kernel: Any) -> None:
    message = rf"policy\.attention: found {kernel} for {name}, .* Expected auto or eager"
    with pytest.raises(UnsupportedPolicyError, match=message) as caught:
        spec_of(name, attention=kernel).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 32}, "Llama4ForCausalLM as the decoder"),
        ("modernbert-decoder", {}, "Linear as the decoder"),
        ("electra", {"is_decoder": True, "embedding_size": 8}, "reads 8 values, its last hidden states have 16"),
        ("roberta", {"is_decoder": True}, "the logits of RobertaForCausalLM are .* away from LMHead"),
        ("cpmant", {"dim_ff": 32, "dim_head": 8, "num_attention_heads": 2}, "more tokens change the hidden states"),
    ],
)
def test_unsupported_family_is_refused(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedPolicyError, match=message) as caught:
        FamilyPolicy(name, options=options).build()
    assert "\n" not in str(caught.value)


def test_unsupported_checkpointing_is_refused() -> None:
    message = r"policy\.gradient_checkpointing: found true for jetmoe, .* expected false\."
    with pytest.raises(UnsupportedPolicyError, match=message):
        FamilyPolicy("jetmoe", options={"kv_channels": 8, "num_local_experts": 2}, gradient_checkpointing=True).build()


def test_kernel_with_other_states_is_refused() -> None:
    """A class that claims a kernel which drops a part of its attention."""
    policy = spec_of("gpt_oss").build()
    policy.causal_lm.config._attn_implementation = "sdpa"
    with pytest.raises(
        UnsupportedPolicyError, match=r"GptOssModel under sdpa differ .* Set policy\.attention to eager"
    ):
        CausalPolicy(policy.causal_lm)
    policy.causal_lm.config._attn_implementation = "segment"
    with pytest.raises(UnsupportedPolicyError, match="found s_aux, which segment attention does not compute"):
        CausalPolicy(policy.causal_lm)


def test_kernel_may_change_states_of_a_few_tokens() -> None:
    """After rounding, a token can be sent to another expert, with other states."""
    backbone = spec_of("llama").build().backbone
    tokens = torch.arange(3, 9)[None]
    with torch.no_grad():
        states = backbone(input_ids=tokens).last_hidden_state
    states[0, [1, 4]] *= -1
    check_kernel(backbone, tokens, states)
    states[0, [0, 3]] *= -1
    with pytest.raises(UnsupportedPolicyError, match=r"LlamaModel under segment differ .* by 200\.00%"):
        check_kernel(backbone, tokens, states)
