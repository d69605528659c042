"""Block-sparse attention for compiled layers on a GPU, by `flex_attention`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

NARROWEST = 16
"""Smallest head that torch's kernel for GPUs accepts. Uncompiled `flex_attention`, as in a check, accepts any."""


def block_sparse_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float | None) -> Tensor:
    """Compute attention in the blocks of `mask` that contain visible tokens.

    Args:
        query: (R, H, T, D).
        key: (R, G, T, D) with G dividing H.
        value: Same shape as `key`.
        mask: Blocks of 128 x 128 tokens, and the visibility rule inside them.
        scaling: Scale of the scores. Default: 1 / sqrt(D).

    Returns:
        (R, T, H, D).

    Raises:
        NotImplementedError: The kernel of a GPU would refuse the heads or their type.
    """
    # Under autocast, rotary embeddings return queries and keys in float32. Cast them, as autocast does for sdpa.
    query, key = query.to(value.dtype), key.to(value.dtype)
    narrowest = min(query.shape[-1], value.shape[-1])
    if narrowest < NARROWEST or value.dtype == torch.float64:
        raise NotImplementedError(
            f"flex_attention: found heads of {narrowest} dimensions in {value.dtype}, expected at least {NARROWEST} in "
            "float32 or less."
        )
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2)


@contextmanager
def uncompiled_attention() -> Iterator[None]:
    """Run `flex_attention` without compilation, and without its warning. Checks have few tokens."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield
