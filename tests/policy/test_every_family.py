"""Every family of causal LMs in transformers: its log-probabilities are right, or it is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.policy import CausalPolicy, TinyPolicy
from lpc_lightning.types import TokenizedPair

Naive = Callable[..., Tensor]
SIZES: dict[str, Any] = {"is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
for value, fields in {
    1024: "vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions max_seq_len",
    32: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim",
    16: "hidden_size word_embed_proj_dim d_model n_embd dim lru_width moe_intermediate_size mamba_d_head "
    "shared_expert_intermediate_size",
    8: "head_dim q_lora_rank kv_lora_rank v_head_dim linear_key_head_dim linear_value_head_dim query_pre_attn_scalar",
    5: "sliding_window attention_window_size window_size local_attention",
    4: "num_experts num_local_experts n_routed_experts qk_rope_head_dim qk_nope_head_dim mamba_d_state state_size "
    "rotary_dim hidden_size_per_layer_input index_topk",
    3: "conv1d_width",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers num_attention_heads num_heads n_head n_heads "
    "num_key_value_heads decoder_attention_heads encoder_attention_heads linear_num_value_heads mamba_n_heads "
    "num_experts_per_tok num_experts_per_token",
    1: "n_group topk_group n_shared_experts first_k_dense_replace linear_num_key_heads mamba_n_groups encoder_layers",
}.items():
    SIZES |= dict.fromkeys(fields.split(), value)
"""Fields of a small model, under the names that families have for them."""
LAYERS = ["sliding_attention", "full_attention"]
OPTIONS: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "layer_types": LAYERS, "intermediate_size": [32, 32]},
        **{"activation_sparsity_pattern": [0.5, 0.0], "altup_num_inputs": 2, "laurel_rank": 4},
    },
    "gemma4_text": {
        **{"num_kv_shared_layers": 0, "layer_types": LAYERS, "global_head_dim": 8, "num_global_key_value_heads": 1},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32, "num_dense_layers": 1},
    "longcat_flash": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "mamba2": {"num_heads": 4, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 16},
    "zamba2": {
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
        **{"mamba_ngroups": 1, "n_mamba_heads": 2},
    },
    "zaya": {"num_experts_per_tok": 1},
}
TOO_LARGE = 3_000_000
"""Parameters of a model that the sizes do not make small, such as one of text and pictures."""
SLOW = {"kimi_linear"}
REFUSED = {
    *("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta"),
    *("roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "prophetnet"),
    *("cpmant", "inkling_text", "llama4_text", "modernbert-decoder", "recurrent_gemma", "xlm", "xlnet", "xlstm"),
}
"""Families with a head of several layers, an unknown change of the logits or future tokens, or without a backbone."""


def small_config(name: str) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[name]
    known = set(kind.attribute_map)
    for base in kind.__mro__:
        known |= {*inspect.get_annotations(base), *inspect.signature(base.__init__).parameters}
    sizes = SIZES | OPTIONS.get(name, {})
    # Of two names for one field, the family's own.
    own = {field: value for field, value in sizes.items() if kind.attribute_map.get(field) not in sizes}
    return kind(**{field: value for field, value in own.items() if field in known})


class AnyPolicy(TinyPolicy):
    """A small policy of any family, with large weights."""

    perturb: Callable[..., None]

    def load_config(self) -> PreTrainedConfig:
        return small_config(self.family)

    def load_model(self, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
        model = super().load_model(config, dtype)
        self.perturb(model, deviation=0.1)
        return model


def plain_model(spec: AnyPolicy) -> PreTrainedModel | None:
    """Make the small model with the family's own attention. Return None if transformers cannot make or run it."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(spec.load_config())
        if sum(weight.numel() for weight in model.parameters()) > TOO_LARGE:
            return None
        config = spec.load_config()
        config._attn_implementation = "eager"
        plain = spec.load_model(config, torch.float32).eval()
        plain(input_ids=torch.arange(3, 11)[None], use_cache=False)
    except Exception:  # from checks of configs to shapes that do not fit
        return None
    return plain


def state_of(spec: AnyPolicy, plain: PreTrainedModel, pairs: list[TokenizedPair], naive_logps: Naive) -> str:
    try:
        policy = spec.build()
    except UnsupportedPolicyError as error:
        return "refused" if "\n" not in str(error) else f"refused in several lines: {error}"
    expected = naive_logps(plain, pairs)
    layouts: list[Layout] = [PaddedLayout(0), *([SharedPrefixLayout(0, 10_000)] if policy.takes_block_mask else [])]
    if fault := fault_of(policy, layouts, pairs, expected):
        return fault
    for trained in (policy.layers[-1:], []):
        policy.requires_grad_(False)
        for layer in trained:
            layer.requires_grad_(True)
        try:
            policy.keep_frozen_states(1.0)
        except UnsupportedPolicyError:
            return "right"
        if fault := fault_of(policy, layouts, pairs, expected):
            return f"{fault}, with {len(trained)} trained layers above frozen states"
    return "right, also with frozen states"


def fault_of(policy: CausalPolicy, layouts: list[Layout], pairs: list[TokenizedPair], expected: Tensor) -> str:
    for layout in layouts:
        # Rounding can send a token to another expert, and change one answer.
        errors = (policy(layout(pairs)).logps() - expected).abs().sort().values
        if not errors[-2] < 1e-3:
            return f"off by {float(errors[-2]):.3g} nats under {type(layout).__name__}"
    return ""


@pytest.mark.slow
@torch.no_grad()
def test_every_family_is_right_or_refused(
    make_pairs: Callable[..., list[TokenizedPair]], naive_logps: Naive, perturb: Callable[..., None]
) -> None:
    pairs = make_pairs([(5, 3, 7), (11, 9, 1)])
    states = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - SLOW):
        spec = AnyPolicy(name)  # type: ignore[arg-type]
        spec.perturb = perturb
        plain = plain_model(spec)
        if plain is not None:
            states[name] = state_of(spec, plain, pairs, naive_logps)
    kept = "right, also with frozen states"
    assert {name: state for name, state in states.items() if state not in ("right", kept, "refused")} == {}
    assert {name for name, state in states.items() if state == "refused"} == REFUSED
    assert len(states) > 155
    assert list(states.values()).count(kept) > 105
