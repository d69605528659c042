"""Attention over packed rows on a CPU, computed for visible keys only.

torch's kernel for CPUs also computes the scores that a mask hides, and its products of small blocks are slow. Here, a
block of queries is multiplied with the keys that it sees, and blocks of similar size are one batched product. The
backward pass recomputes the probabilities (as in FlashAttention, arXiv 2205.14135), so that a layer keeps only its
queries, keys and values. Keys and values are not repeated for grouped queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lpc_lightning.policy.block_sparse import block_sparse_attention
from lpc_lightning.types import PIECES

SEGMENT = "segment"
"""Name of the kernel in transformers' registry. Calls without `blocks` run `sdpa`."""
BLOCK = 48
"""Largest number of queries in a block. The scores above a block's diagonal are computed and discarded."""
PRODUCT = 2**16
"""Largest number of scores per head in a product of several blocks, so that they stay in a processor's cache."""
PADDING = 2**12
"""Scores per head of padding that a product may have. They take about as long as the start of another product."""

SCORE_CHANGES = ("block_indices", "indices", "position_bias", "s_aux", "sinks", "softcap")
"""Arguments of transformers with which a family changes the scores or their softmax."""
LANES = 16
"""The keys of a product are padded to a multiple of this number, so that no vector of sums is cut off."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `first:last` of a segment, as positions in the flattened (R T) tokens, and their visible keys."""

    first: int
    last: int
    prompt: slice
    """Visible keys before the segment: those of its prompt, or none."""
    start: int
    """First position of the segment. Within the segment, query q sees the keys `start:q + 1`."""

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.last - self.first

    @property
    def keys(self) -> int:
        """Number of visible keys of the last query."""
        return self.prompt.stop - self.prompt.start + self.last - self.start


class BlockGroup:
    """B blocks that are one batched product of n queries and m keys each. Smaller blocks are padded at their end.

    Sums over keys then have the order that they have without padding, and zeros behind them. In bfloat16 a policy and
    its reference agree to the last bit, although their batches differ, where a processor's products keep that order.
    """

    def __init__(self, blocks: list[Block]) -> None:
        """Compute positions and masks.

        Args:
            blocks: At least one.
        """
        self.blocks = blocks
        query_counts = torch.tensor([block.queries for block in blocks])
        key_counts = torch.tensor([block.keys for block in blocks])
        queries, keys = int(query_counts.max()), ceil(int(key_counts.max()) / LANES) * LANES
        self.queries = torch.zeros(len(blocks), queries, dtype=torch.long)
        """(B, n) Positions of the queries in the flattened tokens. Those of padding are 0."""
        self.keys = torch.zeros(len(blocks), keys, dtype=torch.long)
        """(B, m) Positions of the keys in the flattened tokens. Those of padding are 0."""
        for row, block in enumerate(blocks):
            prompt, segment = torch.arange(block.prompt.start, block.prompt.stop), torch.arange(block.start, block.last)
            self.queries[row, : block.queries] = segment[block.first - block.start :]
            self.keys[row, : block.keys] = torch.cat([prompt, segment])
        shortest, earlier = int(query_counts.min()), key_counts - query_counts
        self.padding = (torch.arange(shortest, queries) >= query_counts[:, None])[..., None, None]
        """(B, p, 1, 1) True for queries of padding, among the last p. p is the most padding that a block has."""
        self.seen = int(earlier.min()) + 1
        """Number of first keys that all queries see."""
        last = earlier[:, None, None, None] + torch.arange(queries)[:, None]
        self.hidden = torch.arange(self.seen, keys) > last
        """(B, 1, n, m - seen) True for a key that a query does not see, behind the first `seen`."""


class Blocks:
    """All blocks of a batch.

    A plain class, because torch's compiler inspects lists and dataclasses, and would compile again for other blocks.
    """

    def __init__(self, blocks: list[Block]) -> None:
        """Group the blocks.

        Args:
            blocks: Blocks in any order.
        """
        self.groups = [BlockGroup(group) for group in _similar(blocks)]


def _similar(blocks: list[Block]) -> Iterator[list[Block]]:
    """Sort blocks by size, and cut them into groups of at most `PRODUCT` scores with little padding."""
    group: list[Block] = []
    longest = visible = 0
    for block in sorted(blocks, key=lambda block: (block.keys, block.queries)):
        longest, visible = max(longest, block.queries), visible + block.queries * block.keys
        scores = (len(group) + 1) * longest * block.keys  # the last block has the most keys
        if group and (scores > PRODUCT or scores - visible > max(PADDING, scores // 8)):
            yield group
            group, longest, visible = [], block.queries, block.queries * block.keys
        group.append(block)
    if group:
        yield group


def query_blocks(segments: Tensor) -> Blocks:
    """Cut rows into blocks of queries.

    Args:
        segments: (R, T) `PreferenceBatch.segments`. The tokens of a segment are adjacent. A prompt comes before its
            completions.

    Returns:
        All blocks except those of padding.
    """
    blocks: list[Block] = []
    width = segments.shape[1]
    for row, numbers in enumerate(segments.cpu()):
        prompts: dict[int, slice] = {}
        start = row * width
        present, lengths = numbers.unique_consecutive(return_counts=True)
        for segment, length in zip(present.tolist(), lengths.tolist(), strict=True):
            end, owner = start + length, segment - segment % PIECES
            if segment >= 0:
                prompt = prompts.get(owner, slice(start, start))
                prompts.setdefault(owner, slice(start, end))
                # Blocks of equal size, so that a product has little padding.
                size = ceil(length / ceil(length / BLOCK))
                blocks += [Block(first, min(first + size, end), prompt, start) for first in range(start, end, size)]
            start = end
    return Blocks(blocks)


def attend_by_segment(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    blocks: Blocks | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention, with the signature of transformers' attention functions.

    Args:
        module: The attention layer.
        query: (R, H, T, D).
        key: (R, G, T, D) with G dividing H.
        value: Same shape as `key`.
        attention_mask: The mask of a call without `blocks`. A `BlockMask` in a compiled layer on a GPU.
        blocks: Blocks of queries and their visible keys. None runs `sdpa`.
        scaling: Scale of the scores. Default: 1 / sqrt(D).
        options: Other arguments of transformers. Dropout is not supported with `blocks`.

    Returns:
        (R, T, H, D), and None in place of the attention weights.

    Raises:
        ValueError: The family changes the scores.
    """
    if changes := [name for name in SCORE_CHANGES if options.get(name) is not None]:
        raise ValueError(f"found {changes[0]}, which {SEGMENT} attention does not compute, expected a plain softmax")
    if isinstance(attention_mask, BlockMask):
        return block_sparse_attention(query, key, value, attention_mask, scaling), None
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return _by_blocks(query, key, value, blocks, scaling), None


@torch.compiler.disable  # a compiled layer would unroll the loop, and compile again for other segments
def _by_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float | None) -> Tensor:
    # Under autocast, rotary embeddings return queries and keys in float32. Cast them, as autocast does for sdpa.
    flat = [states.to(value.dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Autocast would round the scores of the forward pass, and not those that the backward pass computes again.
    with torch.autocast(query.device.type, enabled=False):
        out = _Attention.apply(*flat, blocks.groups, scale)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


AttentionInterface.register(SEGMENT, attend_by_segment)
AttentionMaskInterface.register(SEGMENT, sdpa_mask)


class _Attention(torch.autograd.Function):
    """Queries (N, H, D), keys and values (N, G, D) of all rows to outputs (N, H, D), with zeros at padding."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: list[BlockGroup], scale: float) -> Tensor:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for group in groups:
            weights = _weights(_queries(query, group, key.shape[1]), _visible(key, group), group, scale)
            _put(out, group, _by_query(weights.to(value.dtype) @ _visible(value, group), group))
        ctx.groups, ctx.scale = groups, scale
        ctx.save_for_backward(query, key, value)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)
        query_gradient = torch.zeros_like(query, memory_format=torch.contiguous_format)
        key_gradient, value_gradient = (torch.zeros(key.shape, dtype=exact) for _ in range(2))
        for group in ctx.groups:
            queries, keys, values = _queries(query, group, key.shape[1]), _visible(key, group), _visible(value, group)
            # Rows of padding have no gradient, so that they add nothing below.
            upstream = _by_head(_without_padding(_take(grad, group.queries), group), key.shape[1])
            weights = _weights(queries, keys, group, ctx.scale)
            _add(value_gradient, group.keys, _by_key(weights.to(value.dtype).mT @ upstream, group))
            weight_gradient = (upstream @ values.mT).to(exact)
            # d(loss)/d(score) = weight * (d(loss)/d(weight) - mean of it under the weights)
            score_gradient = torch._softmax_backward_data(weight_gradient, weights, -1, exact)
            score_gradient = score_gradient.to(query.dtype)
            _put(query_gradient, group, _by_query(score_gradient @ keys, group))
            _add(key_gradient, group.keys, _by_key(score_gradient.mT @ queries, group))
        query_gradient, key_gradient = query_gradient.mul_(ctx.scale), key_gradient.mul_(ctx.scale).to(key.dtype)
        return query_gradient, key_gradient, value_gradient.to(value.dtype), None, None


def _take(states: Tensor, positions: Tensor) -> Tensor:
    """Take the positions (B, n) from (N, H, D): (B, n, H, D)."""
    return states.index_select(0, positions.flatten()).unflatten(0, positions.shape)


def _add(total: Tensor, positions: Tensor, states: Tensor) -> None:
    """Add states (B, n, H, D) to `total` (N, H, D), at the positions (B, n)."""
    total.index_add_(0, positions.flatten(), states.flatten(0, 1).to(total.dtype))


def _put(total: Tensor, group: BlockGroup, states: Tensor) -> None:
    """Copy states (B, n, H, D) to `total` (N, H, D), at the group's queries."""
    for block, rows in zip(group.blocks, states, strict=True):
        total[block.first : block.last] = rows[: block.queries]


def _queries(states: Tensor, group: BlockGroup, heads: int) -> Tensor:
    """Take the group's queries from (N, H, D): (B G, H/G n, D)."""
    return _by_head(_take(states, group.queries), heads)


def _by_head(states: Tensor, heads: int) -> Tensor:
    """Reshape (B, n, H, D) to (B G, H/G n, D), with the query heads of a key's head one after the other."""
    return states.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).reshape(len(states) * heads, -1, states.shape[-1])


def _by_query(states: Tensor, group: BlockGroup) -> Tensor:
    """Reshape (B G, H/G n, D) to (B, n, H, D)."""
    blocks, queries = group.queries.shape
    return states.view(blocks, -1, queries, states.shape[-1]).transpose(1, 2)


def _visible(states: Tensor, group: BlockGroup) -> Tensor:
    """Take the group's keys or values from (N, G, D): (B G, m, D)."""
    return _take(states, group.keys).transpose(1, 2).flatten(0, 1)


def _by_key(states: Tensor, group: BlockGroup) -> Tensor:
    """Reshape (B G, m, D) to (B, m, G, D)."""
    return states.unflatten(0, (len(group.keys), -1)).transpose(1, 2)


def _without_padding(states: Tensor, group: BlockGroup) -> Tensor:
    """Replace the queries of padding in (B, n, H, D) by zeros, in place."""
    states[:, states.shape[1] - group.padding.shape[1] :].masked_fill_(group.padding, 0)
    return states


def _weights(queries: Tensor, keys: Tensor, group: BlockGroup, scale: float) -> Tensor:
    """Compute attention weights (B G, H/G n, m) in float32 or wider. Those of hidden keys are 0."""
    exact = torch.promote_types(queries.dtype, torch.float32)
    scores = (queries.to(exact) * scale) @ keys.to(exact).mT
    by_block = scores.view(len(group.keys), -1, group.queries.shape[1], scores.shape[-1])
    by_block[..., group.seen :].masked_fill_(group.hidden, -torch.inf)
    return scores.softmax(-1)
