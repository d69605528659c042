"""Attention masks for packed rows. Tokens of a completion see its prompt and the completion itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig

from lpc_lightning.policy.segment_attention import SEGMENT
from lpc_lightning.types import PIECES

BLOCK = 128
"""Tokens on each side of a block of `flex_attention`."""
SPARSE = "flex_attention"
"""Kernel that skips blocks without visible tokens."""
WINDOWED, FULL = "sliding_attention", "full_attention"
VisibilityRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def visibility_rule(segments: Tensor, position_ids: Tensor, window: int | None) -> VisibilityRule:
    """Make the rule that decides which keys a query sees, in the form that `flex_attention` expects.

    Args:
        segments: (R, T) `PreferenceBatch.segments`.
        position_ids: (R, T).
        window: Sliding window in tokens (smaller distances are visible), or None.

    Returns:
        A function of row, head, query and key (positions in the row) that returns True if the query sees the key.
        Padding sees padding, so that every query sees a key.
    """

    # Padding has no prompt, and its value here is below every segment. Computed once, not for each pair of tokens.
    prompts = segments - segments % PIECES

    def is_visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        other = segments[row, key]
        result = ((other == segments[row, query]) | (other == prompts[row, query])) & (query >= key)
        if window is not None:
            result = result & (position_ids[row, query] - position_ids[row, key] < window)
        return result

    return is_visible


def visible_pairs(segments: Tensor, position_ids: Tensor, window: int | None) -> Tensor:
    """Apply `visibility_rule` to all pairs of tokens of each row.

    Returns:
        (R, 1, T, T) bool: True at (q, k) if query q sees key k.
    """
    rows, tokens = (torch.arange(size, device=segments.device) for size in segments.shape)
    all_pairs = rows[:, None, None], rows[:1], tokens[None, :, None], tokens[None, None, :]
    return visibility_rule(segments, position_ids, window)(*all_pairs)[:, None]


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None] | None:
    """Return the window of each layer type (None: full), or None if a type (recurrent, chunked) has no mask.

    GPT-Neo computes the windows of its local layers itself, from places in the row.
    """
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return None
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or [FULL if window is None else WINDOWED])
    if not types <= {FULL, WINDOWED}:
        return None
    return {name: window if name == WINDOWED else None for name in sorted(types)}


MakeMask = Callable[[Tensor, Tensor, int | None, torch.dtype], Any]
"""From segments, positions, window and type of the scores to the mask of a kernel."""


def additive_mask(segments: Tensor, position_ids: Tensor, window: int | None, scores: torch.dtype) -> Tensor:
    """Return (R, 1, T, T) in the type of the scores: 0 if visible, else the lowest value.

    `eager` adds this mask to the scores. `sdpa` would make one from a boolean mask again in every layer, and keep it.
    """
    visible = visible_pairs(segments, position_ids, window)
    return torch.zeros_like(visible, dtype=scores).masked_fill(~visible, torch.finfo(scores).min)


def block_sparse_mask(segments: Tensor, position_ids: Tensor, window: int | None, scores: torch.dtype) -> BlockMask:
    """Return the blocks of 128 x 128 tokens that can contain visible tokens, for `flex_attention`.

    It skips all other blocks. Blocks are found by the lowest and highest segment of each 128 tokens, so that there is
    no table of all pairs of tokens and no compilation for each width. (`create_block_mask` needs one of the two, and
    took 40 s to compile for each width on an H200.)
    """
    tokens = segments.shape[1]
    partly, fully = visible_blocks(segments, window)
    return BlockMask.from_kv_blocks(
        *_key_indices(partly),
        *_key_indices(fully),
        BLOCK_SIZE=BLOCK,
        mask_mod=visibility_rule(segments.int(), position_ids.int(), window),
        seq_lengths=(tokens, tokens),
    )


def visible_blocks(segments: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Find the blocks of queries and keys that contain visible tokens.

    Args:
        segments: (R, T) `PreferenceBatch.segments`. A prompt comes before its completions.
        window: Sliding window in tokens, or None.

    Returns:
        Two tensors (R, n, n) bool for n blocks of queries and keys: blocks in which some keys can be visible, and
        blocks in which all are. A block of the first kind can also have no visible key.
    """
    count = -(-segments.shape[1] // BLOCK)
    padding = count * BLOCK - segments.shape[1]
    tiles = torch.nn.functional.pad(segments, (0, padding), value=-1).unflatten(1, (count, BLOCK))
    families = tiles.div(PIECES, rounding_mode="floor")
    is_prompt = (tiles >= 0) & (tiles % PIECES == 0)
    prompts = families.masked_fill(~is_prompt, 2**31).amin(-1), families.masked_fill(~is_prompt, -2).amax(-1)
    low, high = tiles.amin(-1), tiles.amax(-1)
    earlier = torch.ones(count, count, dtype=torch.bool, device=segments.device).tril()
    own = _overlap((low, high), (low, high))
    some = (own | _overlap((families.amin(-1), families.amax(-1)), prompts)) & earlier
    if window is not None:
        return some, torch.zeros_like(some)
    uniform = low == high
    same_segment = low[:, :, None] == low[:, None, :]
    own_prompt = is_prompt.all(-1)[:, None, :] & (families[:, :, 0, None] == families[:, None, :, 0])
    fully = uniform[:, :, None] & uniform[:, None, :] & (same_segment | own_prompt) & earlier.tril(-1)
    return some & ~fully, fully


def _overlap(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
    """Return (R, n, n) bool: True if the ranges (lowest, highest) of query and key blocks, each (R, n), overlap."""
    return (queries[0][:, :, None] <= keys[1][:, None, :]) & (keys[0][:, None, :] <= queries[1][:, :, None])


def _key_indices(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of key blocks of each query block (R, 1, n), and their indices (R, 1, n, n), in order."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]


MASKS: dict[str, MakeMask] = {
    "sdpa": additive_mask,
    SEGMENT: additive_mask,
    "eager": additive_mask,
    SPARSE: block_sparse_mask,
}
"""Kernels that accept a mask for packed rows, and the function that makes it."""


def block_mask(
    segments: Tensor, position_ids: Tensor, config: PreTrainedConfig, attention: str, dtype: torch.dtype
) -> Any:
    """Make the mask that the model's attention kernel expects: one, or one for each layer type.

    Args:
        segments: (R, T) `PreferenceBatch.segments`.
        position_ids: (R, T).
        config: The backbone's config.
        attention: The kernel. One that is not in `MASKS` gets the mask of sdpa.
        dtype: Type of the scores.

    Returns:
        The mask, or a dictionary from layer type to mask.

    Raises:
        ValueError: The model has layers that accept no mask.
    """
    windows = layer_windows(config)
    if windows is None:
        raise ValueError(
            f"data.layout: found packed rows for {config.model_type}, which has layers that accept no mask. Expected "
            "padded."
        )
    make_mask = MASKS.get(attention, additive_mask)
    masks = {name: make_mask(segments, position_ids, window, dtype) for name, window in windows.items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))
