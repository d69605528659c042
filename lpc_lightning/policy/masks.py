"""Attention masks for rows that hold several pieces, each completion seeing its prompt and itself alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig

from lpc_lightning.policy.segment_attention import SEGMENT
from lpc_lightning.types import PIECES

WINDOWED, FULL = "sliding_attention", "full_attention"
Sight = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sight(segments: Tensor, position_ids: Tensor, window: int | None) -> Sight:
    """The rule of who sees whom, for any token of a row: the form in which `flex_attention` takes a mask.

    Args:
        segments: (R, T) `PreferenceBatch.segments`.
        position_ids: (R, T).
        window: Sliding window in tokens (distances below it are seen), or None.

    Returns:
        A function of row, head, query and key (numbers of tokens in the row): whether the query sees the key. Padding
        sees padding, so that no query is blind.
    """

    # Below every segment at padding, which has no prompt. Worked out once: a rule is applied to pairs of tokens.
    prompts = segments - segments % PIECES

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        other = segments[row, key]
        seen = ((other == segments[row, query]) | (other == prompts[row, query])) & (query >= key)
        if window is not None:
            seen = seen & (position_ids[row, query] - position_ids[row, key] < window)
        return seen

    return sees


def visible(segments: Tensor, position_ids: Tensor, window: int | None) -> Tensor:
    """Which tokens each token may look at: `sight`, asked of all pairs of tokens.

    Returns:
        (R, 1, T, T) bool; row q says what q sees.
    """
    rows, tokens = (torch.arange(size, device=segments.device) for size in segments.shape)
    everywhere = rows[:, None, None], rows[:1], tokens[None, :, None], tokens[None, None, :]
    return sight(segments, position_ids, window)(*everywhere)[:, None]


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None] | None:
    """Window (None: full) of each kind of layer, or None where a kind takes no mask (recurrent or chunked layers)."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [FULL if window is None else WINDOWED])
    if not kinds <= {FULL, WINDOWED}:
        return None
    return {kind: window if kind == WINDOWED else None for kind in sorted(kinds)}


Form = Callable[[Tensor, Tensor, int | None, torch.dtype], Any]
"""Segments, positions, window and type of the scores to the mask that a kernel takes."""


def truth(segments: Tensor, position_ids: Tensor, window: int | None, scores: torch.dtype) -> Tensor:
    """(R, 1, T, T) bool, for `sdpa`."""
    return visible(segments, position_ids, window)


def addend(segments: Tensor, position_ids: Tensor, window: int | None, scores: torch.dtype) -> Tensor:
    """(R, 1, T, T) in the type of the scores, to which `eager` adds it."""
    seen = visible(segments, position_ids, window)
    return torch.zeros_like(seen, dtype=scores).masked_fill(~seen, torch.finfo(scores).min)


def blocks(segments: Tensor, position_ids: Tensor, window: int | None, scores: torch.dtype) -> BlockMask:
    """Which blocks of 128 x 128 tokens hold anything to see, for `flex_attention`, which leaves the others out."""
    rows, tokens = segments.shape
    rule = sight(segments.int(), position_ids.int(), window)
    make = _compiled_block_mask() if segments.is_cuda else create_block_mask
    mask: BlockMask = make(rule, rows, None, tokens, tokens, device=segments.device)
    return mask


@cache
def _compiled_block_mask() -> Callable[..., BlockMask]:
    # Uncompiled, it writes out a table of all pairs of tokens.
    return torch.compile(create_block_mask, dynamic=False)


FORMS: dict[str, Form] = {"sdpa": truth, SEGMENT: truth, "eager": addend, "flex_attention": blocks}
"""The kernels that take a block mask, and the form in which they take it."""


def block_mask(
    segments: Tensor, position_ids: Tensor, config: PreTrainedConfig, attention: str, dtype: torch.dtype
) -> Any:
    """The mask in the form that the model's attention kernel takes: one, or one for each kind of layer.

    Args:
        segments: (R, T) `PreferenceBatch.segments`.
        position_ids: (R, T).
        config: The backbone's config.
        attention: The kernel. One that is not in `FORMS` gets what sdpa gets.
        dtype: Type of the scores, for `eager`.

    Returns:
        A mask, or a dictionary of masks by layer type.

    Raises:
        ValueError: The model has layers that take no mask.
    """
    windows = layer_windows(config)
    if windows is None:
        raise ValueError(f"layout: {config.model_type} has layers that take no block mask; set `data.layout: padded`.")
    form = FORMS.get(attention, truth)
    masks = {kind: form(segments, position_ids, window, dtype) for kind, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))
