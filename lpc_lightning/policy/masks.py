"""Attention masks for rows that hold several pieces, each completion seeing its prompt and itself alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lpc_lightning.types import PIECES

WINDOWED, FULL = "sliding_attention", "full_attention"


def visible(segments: Tensor, position_ids: Tensor, window: int | None) -> Tensor:
    """Which tokens each token may look at.

    Args:
        segments: (R, T) `PreferenceBatch.segments`.
        position_ids: (R, T).
        window: Sliding window in tokens (distances below it are seen), or None.

    Returns:
        (R, 1, T, T) bool; row q says what q sees. Padding sees padding, so that no row is empty.
    """
    query, key = segments[:, :, None], segments[:, None, :]
    own_prompt = (key == query - query % PIECES) & (query >= 0)
    tokens = torch.arange(segments.shape[1], device=segments.device)
    seen = ((key == query) | own_prompt) & (tokens[:, None] >= tokens[None, :])
    if window is not None:
        seen &= position_ids[:, :, None] - position_ids[:, None, :] < window
    return seen[:, None]


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None] | None:
    """Window (None: full) of each kind of layer, or None where a kind takes no mask (recurrent or chunked layers)."""
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [FULL if window is None else WINDOWED])
    if not kinds <= {FULL, WINDOWED}:
        return None
    return {kind: window if kind == WINDOWED else None for kind in sorted(kinds)}


def block_mask(
    segments: Tensor, position_ids: Tensor, config: PreTrainedConfig, attention: str, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """The mask in the form that the model's attention kernel takes: one tensor, or one for each kind of layer.

    Args:
        segments: (R, T) `PreferenceBatch.segments`.
        position_ids: (R, T).
        config: The backbone's config.
        attention: `sdpa` takes a bool mask, `eager` one that is added to the scores.
        dtype: Type of the scores, for `eager`.

    Returns:
        (R, 1, T, T), or a dictionary of such by layer type.

    Raises:
        ValueError: The model has layers that take no mask.
    """
    windows = layer_windows(config)
    if windows is None:
        raise ValueError(f"layout: {config.model_type} has layers that take no block mask; set `data.layout: padded`.")
    masks = {kind: visible(segments, position_ids, window) for kind, window in windows.items()}
    if attention == "eager":
        low = torch.finfo(dtype).min
        masks = {kind: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, low) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))
