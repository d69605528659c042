"""Attention masks for rows that hold several pieces, each completion seeing its prompt and itself alone."""

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
    """Return the blocks of 128 x 128 tokens in which anything may be visible, for `flex_attention`.

    It skips all other blocks. They follow from the lowest and highest segment of each 128 tokens. So no table of all
    pairs of tokens is made, and nothing is compiled for each width. (`create_block_mask` needs one of the two, and
    took 40 s to compile for each width on an H200.)
    """
    tokens = segments.shape[1]
    partly, fully = visible_blocks(segments, window)
    return BlockMask.from_kv_blocks(
        *_listed(partly),
        *_listed(fully),
        BLOCK_SIZE=BLOCK,
        mask_mod=sight(segments.int(), position_ids.int(), window),
        seq_lengths=(tokens, tokens),
    )


def visible_blocks(segments: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Find the blocks of queries and keys that can see each other.

    Args:
        segments: (R, T) `PreferenceBatch.segments`. A prompt stands before its completions.
        window: Sliding window in tokens, or None.

    Returns:
        (R, n, n) bool for n blocks of queries and keys: blocks in which some keys may be visible, and other blocks in
        which all are. A block of the first kind may turn out to hold no visible key.
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
    """Whether ranges (lowest, highest) of query blocks and key blocks, each (R, n), overlap: (R, n, n)."""
    return (queries[0][:, :, None] <= keys[1][:, None, :]) & (keys[0][:, None, :] <= queries[1][:, :, None])


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of key blocks of each query block (R, 1, n), and their indices (R, 1, n, n), the visible ones first."""
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], indices.int()[:, None]


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
