"""Block-sparse attention on a GPU: `flex_attention`, inside a compiled layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Compute attention where `mask` has anything to see.

    Args:
        query: (R, H, T, D).
        key: (R, G, T, D) with G dividing H.
        value: Like `key`.
        mask: Blocks of 128 x 128 tokens, and the rule inside them.
        scaling: Factor of the scores. Default: 1 / sqrt(D).

    Returns:
        (R, T, H, D).
    """
    # Rotary embeddings leave queries and keys in float32 under autocast; sdpa would cast them in the same way.
    query, key = query.to(value.dtype), key.to(value.dtype)
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)
