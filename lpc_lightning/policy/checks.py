"""Checks of a new policy: its decoder, head, kernel and packed rows on a few tokens, and its longest row."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lpc_lightning.errors import UnsupportedPolicyError, one_line
from lpc_lightning.policy.attention_kernel import EXACT, check_kernel, differences, eager_attention, is_flash, rounding
from lpc_lightning.policy.head import check_head

if TYPE_CHECKING:
    from lpc_lightning.policy.causal import CausalPolicy

PROMPT, CHOSEN, REJECTED = 3, 2, 3
"""Numbers of tokens of the pieces of a row."""
FIXED_TABLES = dict.fromkeys(("codegen", "ctrl", "gptj"), "max_position_embeddings") | {"mpt": "max_seq_len"}
"""Fields with the number of positions, by family with a table of positions that is not learned and does not grow."""


@torch.no_grad()
def check_policy(policy: CausalPolicy) -> Tensor:
    """Check the decoder, the head and the attention kernel.

    Returns:
        (1, T, d) states of a prompt and its rejected answer, for `separates_segments`.

    Raises:
        UnsupportedPolicyError: One of them is not supported.
    """
    model, backbone = policy.causal_lm, policy.causal_lm.get_decoder()
    if backbone is model or not isinstance(backbone, PreTrainedModel):
        raise UnsupportedPolicyError(
            f"policy: found {type(model).__name__}, in which transformers finds {type(backbone).__name__} as the "
            "decoder, expected the model without its head. Choose a model of another family."
        )
    row = _row(policy)
    tokens = torch.cat([row[:, :PROMPT], row[:, -REJECTED:]], dim=1)
    places = torch.arange(tokens.shape[1], device=row.device)[None]
    try:
        with eager_attention(backbone) if is_flash(backbone.config._attn_implementation) else nullcontext():
            states = policy.states(tokens, torch.ones_like(tokens), None, places)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedPolicyError(
            f"policy: {type(model).__name__} cannot compute the hidden states of a few tokens "
            f"({type(error).__name__}: {one_line(error)}). Expected a decoder-only model. Choose one of another "
            "family, or set policy.attention to eager."
        ) from error
    check_head(model, tokens, states)
    check_kernel(backbone, tokens, states)
    return states


def check_longest(config: PreTrainedConfig, longest: int | None) -> None:
    """Refuse pairs for which the positions of a row depend on the longest row of its batch.

    transformers chooses the rotary frequencies of `longrope` and `dynamic` by the largest position of a batch. Beyond
    the model's original context a pair would have other log-probabilities in each batch than those in the cache.

    Args:
        config: Config of the decoder.
        longest: Maximum number of tokens of a prompt and an answer. None: no limit.

    Raises:
        UnsupportedPolicyError: The pairs may be longer than the original context.
    """
    for rope in _ropes(config):
        if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):
            context = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            if longest is None or longest > context:
                raise UnsupportedPolicyError(
                    f"data.max_length: found {'null' if longest is None else longest}, expected at most {context} for "
                    f"{config.model_type} with rope_type {kind}: beyond it, the log-probabilities of a pair depend on "
                    "the longest row of its batch. Set data.max_length (evaluate, adapt and explain: --max_length), or "
                    "choose another model."
                )


def check_context(backbone: PreTrainedModel, longest: int) -> None:
    """Refuse pairs longer than a model's table of positions. Warn of pairs longer than the context of a rotary model.

    Args:
        backbone: The model without its head.
        longest: Number of tokens of the longest prompt and answer.

    Raises:
        UnsupportedPolicyError: The model has no position for the last tokens.
    """
    config = backbone.config
    end, advice = _table_of_positions(backbone), "(evaluate, adapt and explain: --max_length)"
    if end is not None and longest > end:
        raise UnsupportedPolicyError(
            f"data.max_length: found pairs of up to {longest} tokens, expected at most {end}, the positions that this "
            f"{config.model_type} has. Set data.max_length to {end} or less {advice}, or choose another model."
        )
    context = _rotary_context(config)
    if context is not None and longest > context:
        rank_zero_warn(
            f"data.max_length: found pairs of up to {longest} tokens, and a context of {context} "
            f"(max_position_embeddings of {config.model_type}), beyond which the model's log-probabilities are not to "
            f"be relied on. Set data.max_length to {context} or less {advice}, or choose another model."
        )


def _table_of_positions(backbone: PreTrainedModel) -> int | None:
    """Return the number of positions in a model's table, learned or fixed. None if it has no table."""
    config = backbone.config
    if config.model_type in FIXED_TABLES:
        return int(getattr(config, FIXED_TABLES[config.model_type]))
    context, tokens = getattr(config, "max_position_embeddings", None), backbone.get_input_embeddings()
    if context is None or getattr(config, "rope_parameters", None):
        return None
    tables = (part for part in backbone.modules() if isinstance(part, nn.Embedding) and part is not tokens)
    # OPT and others have two positions more, which no token gets.
    return context if any(0 <= table.num_embeddings - context <= 2 for table in tables) else None


def _rotary_context(config: PreTrainedConfig) -> int | None:
    """Return the context of a rotary model, with its scaling. None if it is another model, or if it is not known."""
    context = getattr(config, "max_position_embeddings", None)
    if context is None or not (ropes := _ropes(config)) or getattr(config, "alibi", False):
        return None
    scaled = [(rope.get("original_max_position_embeddings") or context) * (rope.get("factor") or 1) for rope in ropes]
    return int(max(context, *scaled))


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the parameters of rotary positions, also those for each kind of layer."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return [parameters, *(each for each in parameters.values() if isinstance(each, dict))] if parameters else []


@torch.no_grad()
def separates_segments(policy: CausalPolicy, alone: Tensor, mask_kernel: str | None = None) -> bool:
    """Compare an answer beside another one with the states of it alone. Recurrent layers give other states.

    Some families refuse a mask of four dimensions, or one of blocks.

    Args:
        policy: The policy.
        alone: The states that `check_policy` returns.
        mask_kernel: Kernel that the mask is made for. Default: the policy's.
    """
    try:
        packed = policy.states(*packed_row(policy), mask_kernel)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    pieces = (packed[:, :PROMPT], alone[:, :PROMPT]), (packed[:, -REJECTED:], alone[:, -REJECTED:])
    bound = rounding(alone)
    # In 16 bits, rounding can send a token to another expert.
    largest = torch.max if bound == EXACT else torch.median
    return all(bool(largest(differences(*piece)) <= bound) for piece in pieces)


def packed_row(policy: CausalPolicy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return token ids, attention mask, segments and positions, each (1, T), of a prompt with two answers."""
    row = _row(policy)
    segments = torch.tensor([[0] * PROMPT + [1] * CHOSEN + [2] * REJECTED], device=row.device)
    places = torch.tensor([[*range(PROMPT + CHOSEN), *range(PROMPT, PROMPT + REJECTED)]], device=row.device)
    return row, torch.ones_like(row), segments, places


def _row(policy: CausalPolicy) -> Tensor:
    """Return (1, T) tokens from all of the vocabulary.

    The first ones are special tokens. A model reads them in no text, and in 16 bits their states are mostly rounding
    errors.
    """
    count = PROMPT + CHOSEN + REJECTED
    odd = torch.arange(1, 2 * count, 2, device=policy.model.device)
    return odd[None] * policy.head.weight.shape[0] // (2 * count)
