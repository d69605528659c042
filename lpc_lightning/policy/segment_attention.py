"""Attention over packed rows on a CPU, computed for visible keys only.

torch's kernel for CPUs also computes the scores that a mask hides, and its products of small blocks are slow. Here,
each block of queries is one batched product with the keys that it sees. The backward pass recomputes the probabilities
(as in FlashAttention, arXiv 2205.14135), so that a layer keeps only its queries, keys, values and outputs. Keys and
values are not repeated for grouped queries.
"""

from __future__ import annotations

from dataclasses import dataclass
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
BLOCK = 64
"""Largest number of queries in a block. The scores above a block's diagonal are computed and discarded."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `first:last` of a segment, as positions in the flattened (R T) tokens, and their visible keys."""

    first: int
    last: int
    prompt: slice
    """Visible keys before the segment: those of its prompt, or none."""
    start: int
    """First position of the segment. Within the segment, query q sees the keys `start:q + 1`."""


class Blocks:
    """All blocks of a batch.

    A plain class, because torch's compiler inspects lists and dataclasses, and would compile again for other blocks.
    """

    def __init__(self, blocks: list[Block]) -> None:
        """Keep the blocks."""
        self.blocks = blocks


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
                blocks += [Block(first, min(first + BLOCK, end), prompt, start) for first in range(start, end, BLOCK)]
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
    """
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
    out = _Attention.apply(*flat, blocks.blocks, scale)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


AttentionInterface.register(SEGMENT, attend_by_segment)
AttentionMaskInterface.register(SEGMENT, sdpa_mask)


class _Attention(torch.autograd.Function):
    """Queries (N, H, D), keys and values (N, G, D) of all rows to outputs (N, H, D), with zeros at padding."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float) -> Tensor:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        normalisers = []
        for block in blocks:
            scores = _scores(_queries(query, block, key.shape[1]), _visible(key, block), block, scale)
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            normalisers.append(largest.add_(total.log()))
            means = weights.div_(total).to(value.dtype) @ _visible(value, block)
            out[block.first : block.last] = _ungrouped(means, block)
        ctx.blocks, ctx.scale, ctx.normalisers = blocks, scale, normalisers
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)
        query_gradient = torch.zeros_like(query, memory_format=torch.contiguous_format)
        key_gradient, value_gradient = (torch.zeros(key.shape, dtype=exact) for _ in range(2))
        for block, normaliser in zip(ctx.blocks, ctx.normalisers, strict=True):
            queries, keys, values = _queries(query, block, key.shape[1]), _visible(key, block), _visible(value, block)
            upstream = _queries(grad, block, key.shape[1])
            weights = _scores(queries, keys, block, ctx.scale).sub_(normaliser).exp_()
            _add(value_gradient, block, weights.to(value.dtype).mT @ upstream)
            outputs = _queries(out, block, key.shape[1])
            # d(loss)/d(score) = weight * (d(loss)/d(weight) - mean of it under the weights)
            mean = (upstream.to(exact) * outputs.to(exact)).sum(-1, keepdim=True)
            weight_gradient = (upstream @ values.mT).to(exact)
            score_gradient = weight_gradient.sub_(mean).mul_(weights).mul_(ctx.scale).to(query.dtype)
            query_gradient[block.first : block.last] = _ungrouped(score_gradient @ keys, block)
            _add(key_gradient, block, score_gradient.mT @ queries)
        return query_gradient, key_gradient.to(key.dtype), value_gradient.to(value.dtype), None, None


def _queries(states: Tensor, block: Block, groups: int) -> Tensor:
    """Take the block's queries from (N, H, D): (G, H/G n, D), with the heads of a group one after the other."""
    return states[block.first : block.last].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _ungrouped(states: Tensor, block: Block) -> Tensor:
    """Reshape (G, H/G n, D) back to (n, H, D)."""
    return states.unflatten(1, (-1, block.last - block.first)).permute(2, 0, 1, 3).flatten(1, 2)


def _visible(states: Tensor, block: Block) -> Tensor:
    """Take the block's visible keys or values from (N, G, D): (G, m, D). `_scores` hides those above the diagonal."""
    return torch.cat([states[block.prompt], states[block.start : block.last]]).transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, block: Block, scale: float) -> Tensor:
    """Compute scores (G, H/G n, m) in float32 or wider, with -inf above the diagonal."""
    exact = torch.promote_types(queries.dtype, torch.float32)
    scores = (queries.to(exact) * scale) @ keys.to(exact).mT
    length = block.last - block.first
    hidden = torch.ones(length, length, dtype=torch.bool).triu_(1)
    scores.unflatten(1, (-1, length))[..., -length:].masked_fill_(hidden, -torch.inf)
    return scores


def _add(total: Tensor, block: Block, values: Tensor) -> None:
    """Add `values` (G, m, D) to `total` (N, G, D), at the block's visible keys."""
    prompt = block.prompt.stop - block.prompt.start
    total[block.prompt] += values[:, :prompt].transpose(0, 1)
    total[block.start : block.last] += values[:, prompt:].transpose(0, 1)
