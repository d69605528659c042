"""The LM head of a policy, with what its family does to the logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lpc_lightning.policy.logprobs import logits_of
from lpc_lightning.types import LogitHead

SCALES: dict[str, Callable[[float], float]] = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1 / value,  # Granite
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
}
"""Config fields by which families scale their logits, as a factor."""


class UnsupportedPolicyError(ValueError):
    """A model that this suite cannot serve, with the reason in one sentence."""


def head_of(model: PreTrainedModel) -> LogitHead:
    """Read the head off a causal LM.

    Raises:
        UnsupportedPolicyError: The model's output layer is not linear.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UnsupportedPolicyError(
            f"policy: found {type(model).__name__} with {type(linear).__name__} as its output layer, expected a linear "
            "LM head: a latent is added to the states that enter it. Take a decoder-only model with a linear head."
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
def check_head(model: PreTrainedModel, backbone: nn.Module) -> None:
    """Compare our reading of the head with the model's own logits on a few tokens.

    Families change their logits in ways that no config field announces; this finds out instead of knowing them all.

    Raises:
        UnsupportedPolicyError: The two differ.
    """
    head = head_of(model)
    tokens = torch.arange(8, device=head.weight.device)[None] % head.weight.shape[0]
    with _any_attention(model):
        theirs = model(input_ids=tokens, use_cache=False).logits.float()
        states = backbone(input_ids=tokens, use_cache=False).last_hidden_state
    ours = logits_of(states.flatten(0, 1), head)
    apart = (ours - theirs.flatten(0, 1)).abs().max()
    tolerance = (0.05 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3) * theirs.abs().max().clamp_min(
        1
    )
    if not apart <= tolerance:
        raise UnsupportedPolicyError(
            f"policy: the logits of {type(model).__name__} are {apart:.3g} away from LMHead(last hidden state), "
            "expected at most rounding: its family does something to them that this suite does not know, so that log-"
            f"probabilities would be wrong. Known are a bias, a soft cap and the scales {', '.join(SCALES)}."
        )


@contextmanager
def _any_attention(model: PreTrainedModel) -> Iterator[None]:
    """Replace flash attention, which runs on a GPU and on 16-bit states alone.

    Models are built on a CPU as well, and float32 weights are trained with it under autocast.
    """
    kernel = model.config._attn_implementation
    if kernel is None or not kernel.startswith("flash"):
        yield
        return
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = kernel


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that the model knows every token id that the tokenizer can make.

    Raises:
        UnsupportedPolicyError: It does not.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    rows, largest = embedding.num_embeddings, max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UnsupportedPolicyError(
            f"policy: the vocabulary does not fit: the tokenizer makes ids up to {largest}, the embedding has {rows} "
            "rows. Expected at most as many ids as rows: take the tokenizer of the model (policy.tokenizer)."
        )
