"""The LM head of a policy, including its family's scale and soft cap of the logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.policy.attention_kernel import eager_attention, is_flash
from lpc_lightning.policy.logprobs import logits_of
from lpc_lightning.types import LogitHead

SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
}
"""Config fields that scale the logits of a family, each with its value as a factor."""


def head_of(model: PreTrainedModel) -> LogitHead:
    """Return the head of a causal LM.

    Raises:
        UnsupportedPolicyError: The model's output layer is not linear.
    """
    linear = model.get_output_embeddings()
    if hasattr(linear, "base_layer"):
        raise UnsupportedPolicyError(
            f"policy: found an adapter on the LM head of {type(model).__name__}, expected a linear LM head, because a "
            "latent is added to its inputs. Leave lm_head out of policy.lora.target_modules, or set "
            "policy.merge_adapter to true."
        )
    if not isinstance(linear, nn.Linear):
        raise UnsupportedPolicyError(
            f"policy: found {type(model).__name__} with {type(linear).__name__} as its output layer, expected a linear "
            "LM head, because a latent is added to its inputs. Choose a decoder-only model with a linear head."
        )
    config = model.config.get_text_config()
    scale = 1.0
    for field, factor in SCALES.items():
        value = getattr(config, field, None)
        if isinstance(value, int | float):
            scale *= factor(value)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitHead(linear.weight, linear.bias, scale, softcap)


@torch.no_grad()
def check_head(model: PreTrainedModel, tokens: Tensor, states: Tensor) -> None:
    """Compare the logits of `head_of` with those of the model on a few tokens.

    A family can change its logits without a config field for it, so that the config alone is not enough.

    Args:
        model: The causal LM.
        tokens: (1, T).
        states: (1, T, d) last hidden states of `tokens`.

    Raises:
        UnsupportedPolicyError: The logits differ by more than rounding.
    """
    head = head_of(model)
    # The same kernel as for the states. Flash attention cannot run on every device and type.
    with eager_attention(model) if is_flash(model.config._attn_implementation) else nullcontext():
        expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float()
    if states.shape[-1] != head.weight.shape[1]:
        raise UnsupportedPolicyError(
            f"policy: the LM head of {type(model).__name__} reads {head.weight.shape[1]} values, its last hidden "
            f"states have {states.shape[-1]}, expected as many. Choose a model of another family."
        )
    logits = logits_of(states.flatten(0, 1), head)
    difference = (logits - expected.flatten(0, 1)).abs().max()
    relative = 0.05 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not difference <= relative * expected.abs().max().clamp_min(1):
        raise UnsupportedPolicyError(
            f"policy: the logits of {type(model).__name__} are {difference:.3g} away from LMHead(last hidden state), "
            "expected at most rounding. Its family changes the logits in an unsupported way, so that log-"
            "probabilities would be wrong. "
            f"Supported are a bias, a soft cap and the scales {', '.join(SCALES)}. "
            "Choose a model of another family."
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model has an embedding for every token id of the tokenizer.

    Raises:
        UnsupportedPolicyError: A token id has no embedding.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    rows, largest = embedding.num_embeddings, max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UnsupportedPolicyError(
            f"policy: the vocabulary does not fit: the tokenizer makes ids up to {largest}, the embedding has {rows} "
            "rows. Expected at most as many ids as rows. Set policy.tokenizer to the tokenizer of the model."
        )
