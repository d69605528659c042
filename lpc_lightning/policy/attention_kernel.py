"""The attention kernel of a policy: the one that a setting means for a family, and a check of what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

from lpc_lightning.errors import UnsupportedPolicyError
from lpc_lightning.policy.segment_attention import SEGMENT

Attention = Literal["auto", "segment", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]
EAGER = "eager"
"""The family's own formula, which every family has."""
EXACT = 1e-3
"""Bound on the share by which states in float32 or float64 differ after other kernels or shapes of a batch."""


def kernel_of(setting: Attention, config: PreTrainedConfig) -> str:
    """Return the kernel in transformers' registry for the setting `policy.attention` and a family.

    Raises:
        UnsupportedPolicyError: The family has no such kernel. It would compute other scores, or fail.
    """
    family = cast(type[PreTrainedModel] | None, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    kernels = {EAGER} if family is None else _kernels(family)
    if setting == "auto":
        return SEGMENT if SEGMENT in kernels else EAGER
    if family is not None and setting not in kernels:
        raise UnsupportedPolicyError(
            f"policy.attention: found {setting} for {config.model_type}, whose attention in transformers does not "
            f"support it. Expected auto or {', '.join(sorted(kernels))}."
        )
    return setting


def _kernels(family: type[PreTrainedModel]) -> set[str]:
    """Return the kernels of a family. Soft caps, attention sinks and biases of positions exclude sdpa.

    `segment` needs a class that passes its attention to any kernel. A class without the interface has a dictionary of
    kernels, or none. A class with sdpa alone makes the mask of its sparse attention for sdpa and eager only.
    """
    sdpa, flash, flex = family._supports_sdpa, family._supports_flash_attn, family._supports_flex_attn
    supported = {
        "sdpa": sdpa,
        SEGMENT: sdpa and (flash or flex) and family._can_set_attn_implementation(),
        "flex_attention": flex,
        "flash_attention_2": flash,
        "flash_attention_3": flash,
    }
    return {EAGER, *(kernel for kernel, supports in supported.items() if supports)}


@torch.no_grad()
def check_kernel(backbone: PreTrainedModel, tokens: Tensor, states: Tensor) -> None:
    """Compare hidden states under the model's kernel with those of the family's own formula, before two more tokens.

    transformers passes what a family computes besides softmax attention to every kernel, and most kernels ignore what
    they do not support. Flash attention is not compared: it runs only on a GPU, in 16 bits.

    Args:
        backbone: The model without its head.
        tokens: (1, T).
        states: (1, T, d) last hidden states of `tokens` under the kernel.

    Raises:
        UnsupportedPolicyError: The states differ by more than rounding.
    """
    kernel = backbone.config._attn_implementation
    longer = torch.cat([tokens, tokens[:, :2]], dim=1)
    with eager_attention(backbone):
        whole = backbone(input_ids=longer, attention_mask=torch.ones_like(longer), use_cache=False).last_hidden_state
    # After rounding, a mixture of experts sends a few tokens to other experts, so that the largest share means nothing.
    share = float(differences(states, whole[:, : tokens.shape[1]]).median())
    if share <= rounding(states):
        return
    name = type(backbone).__name__
    if kernel == EAGER or is_flash(kernel):
        raise UnsupportedPolicyError(
            f"policy: two more tokens change the hidden states of {name} at earlier tokens by {share:.2%}, expected at "
            "most rounding. Choose a decoder-only model, which reads from left to right."
        )
    raise UnsupportedPolicyError(
        f"policy.attention: the hidden states of {name} under {kernel} differ from those of its own formula by "
        f"{share:.2%}, expected at most rounding. Log-probabilities would be wrong. Set policy.attention to eager."
    )


def differences(states: Tensor, expected: Tensor) -> Tensor:
    """Return (T,) norms of the differences between (1, T, d) states, as shares of the norms of the expected ones."""
    # The states of a padding token can be 0.
    norms = expected.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((states - expected).float().norm(dim=-1) / norms).flatten()


def rounding(states: Tensor) -> float:
    """Return a bound on the `differences` of equal states after other kernels or shapes of a batch."""
    products = torch.get_float32_matmul_precision() if states.is_cuda else "highest"
    exact = states.dtype == torch.float64 or (states.dtype == torch.float32 and products == "highest")
    return EXACT if exact else 0.1


def is_flash(kernel: str | None) -> bool:
    """Return True for flash attention, which runs only on a GPU and on 16-bit states.

    Models are also built on a CPU, or with float32 weights.
    """
    return kernel is not None and kernel.startswith("flash")


@contextmanager
def finite_masks(model: PreTrainedModel) -> Iterator[None]:
    """Hide keys by the lowest float32 in masks that transformers makes for a float64 model with its own formula.

    The lowest float64 is -inf in that formula's softmax, which is in float32. Padding that sees no key would be NaN,
    and make NaN of every token of its row.
    """
    if model.config._attn_implementation != EAGER or model.dtype != torch.float64:
        yield
        return

    def mask(**options: Any) -> Tensor | None:
        return eager_mask(**(options | {"dtype": torch.float32}))

    published = ALL_MASK_ATTENTION_FUNCTIONS[EAGER]
    ALL_MASK_ATTENTION_FUNCTIONS[EAGER] = mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[EAGER] = published


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute attention by the family's own formula, for a few tokens."""
    kernel = model.config._attn_implementation
    model.config._attn_implementation = EAGER
    try:
        yield
    finally:
        model.config._attn_implementation = kernel
