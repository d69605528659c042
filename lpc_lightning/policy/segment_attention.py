"""Attention over rows that hold several pieces, on a CPU: each piece with what it sees, and nothing besides.

torch's own kernel for CPUs computes what a mask hides, and multiplies small blocks at a fraction of the speed of whole
matrices. Here every block of queries is one batched product with just the keys that it sees. Probabilities are worked
out again in the backward pass (as in FlashAttention, arXiv 2205.14135), so that a layer keeps no more than its queries,
keys, values and outputs; keys and values are not repeated for grouped queries.
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
"""Name of the kernel in transformers' registry. Where it is not told the pieces of the rows, it is `sdpa`."""
BLOCK = 64
"""Most queries of a block: what lies above the diagonal of a block is computed in vain."""


@dataclass(frozen=True, slots=True)
class Block:
    """Queries `first:last` of a piece, as positions in the flattened (R T) tokens, and the keys that they see."""

    first: int
    last: int
    prompt: slice
    """The keys before the piece itself: its prompt, or none."""
    start: int
    """Where the piece starts; of its own keys, query q sees `start:q + 1`."""


class Blocks:
    """All blocks of a batch.

    Neither a list nor a dataclass: torch's compiler looks into those, and compiles again for blocks that differ.
    """

    def __init__(self, blocks: list[Block]) -> None:
        """Keep them."""
        self.blocks = blocks


def blocks_of(segments: Tensor) -> Blocks:
    """Cut rows into blocks of queries.

    Args:
        segments: (R, T) `PreferenceBatch.segments`. Each piece lies in one run, and a prompt before its completions.

    Returns:
        All blocks but those of padding.
    """
    blocks: list[Block] = []
    width = segments.shape[1]
    for row, pieces in enumerate(segments.cpu()):
        prompts: dict[int, slice] = {}
        start = row * width
        numbers, lengths = pieces.unique_consecutive(return_counts=True)
        for segment, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
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
    """An attention function of transformers.

    Args:
        module: The attention layer.
        query: (R, H, T, D).
        key: (R, G, T, D) with G dividing H.
        value: Like `key`.
        attention_mask: The mask, for calls without `blocks`; a `BlockMask` inside a compiled layer on a GPU.
        blocks: What sees what; None is plain `sdpa`.
        scaling: Factor of the scores. Default: 1 / sqrt(D).
        options: What else transformers passes; dropout is not supported with blocks.

    Returns:
        (R, T, H, D), and no weights.
    """
    if isinstance(attention_mask, BlockMask):
        return block_sparse_attention(query, key, value, attention_mask, scaling), None
    if blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    return _by_blocks(query, key, value, blocks, scaling), None


@torch.compiler.disable  # or a compiled layer would unroll the loop, and be compiled again for other pieces
def _by_blocks(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scaling: float | None) -> Tensor:
    # Rotary embeddings leave queries and keys in float32 under autocast; sdpa would cast them in the same way.
    flat = [states.to(value.dtype).transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Attention.apply(*flat, blocks.blocks, scale)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


AttentionInterface.register(SEGMENT, attend_by_segment)
AttentionMaskInterface.register(SEGMENT, sdpa_mask)


class _Attention(torch.autograd.Function):
    """Queries (N, H, D), keys and values (N, G, D) of all rows to outputs (N, H, D); zeros at padding."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float) -> Tensor:
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        normalisers = []
        for block in blocks:
            scores = _scores(_queries(query, block, key.shape[1]), _seen(key, block), block, scale)
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            normalisers.append(largest.add_(total.log()))
            means = weights.div_(total).to(value.dtype) @ _seen(value, block)
            out[block.first : block.last] = _ungrouped(means, block)
        ctx.blocks, ctx.scale, ctx.normalisers = blocks, scale, normalisers
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        exact = torch.promote_types(query.dtype, torch.float32)
        to_query = torch.zeros_like(query, memory_format=torch.contiguous_format)
        to_key, to_value = (torch.zeros(key.shape, dtype=exact) for _ in range(2))
        for block, normaliser in zip(ctx.blocks, ctx.normalisers, strict=True):
            queries, keys, values = _queries(query, block, key.shape[1]), _seen(key, block), _seen(value, block)
            upstream = _queries(grad, block, key.shape[1])
            weights = _scores(queries, keys, block, ctx.scale).sub_(normaliser).exp_()
            _add(to_value, block, weights.to(value.dtype).mT @ upstream)
            outputs = _queries(out, block, key.shape[1])
            pull = (upstream.to(exact) * outputs.to(exact)).sum(-1, keepdim=True)
            pulled = (upstream @ values.mT).to(exact).sub_(pull).mul_(weights).mul_(ctx.scale).to(query.dtype)
            to_query[block.first : block.last] = _ungrouped(pulled @ keys, block)
            _add(to_key, block, pulled.mT @ queries)
        return to_query, to_key.to(key.dtype), to_value.to(value.dtype), None, None


def _queries(states: Tensor, block: Block, groups: int) -> Tensor:
    """(N, H, D) to the block's (G, H/G n, D): the heads that share a key, one behind the other."""
    return states[block.first : block.last].unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _ungrouped(states: Tensor, block: Block) -> Tensor:
    """Back to (n, H, D)."""
    return states.unflatten(1, (-1, block.last - block.first)).permute(2, 0, 1, 3).flatten(1, 2)


def _seen(states: Tensor, block: Block) -> Tensor:
    """(N, G, D) to the (G, m, D) that the block's queries see, some of its own keys hidden by the diagonal."""
    return torch.cat([states[block.prompt], states[block.start : block.last]]).transpose(0, 1)


def _scores(queries: Tensor, keys: Tensor, block: Block, scale: float) -> Tensor:
    """(G, H/G n, m) in float32 or wider; -inf above the diagonal."""
    exact = torch.promote_types(queries.dtype, torch.float32)
    scores = (queries.to(exact) * scale) @ keys.to(exact).mT
    length = block.last - block.first
    hidden = torch.ones(length, length, dtype=torch.bool).triu_(1)
    scores.unflatten(1, (-1, length))[..., -length:].masked_fill_(hidden, -torch.inf)
    return scores


def _add(total: Tensor, block: Block, found: Tensor) -> None:
    """Add (G, m, D) to the (N, G, D) of the keys that the block sees."""
    prompt = block.prompt.stop - block.prompt.start
    total[block.prompt] += found[:, :prompt].transpose(0, 1)
    total[block.start : block.last] += found[:, prompt:].transpose(0, 1)
