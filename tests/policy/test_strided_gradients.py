"""Tests of the backward passes of this project's autograd functions on gradients of any strides.

What comes after a function decides the strides: `sum` gives an expanded gradient, attention behind a norm of heads a
transposed one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lpc_lightning.policy.cast_weights import _Cast
from lpc_lightning.policy.logprobs import token_logps_per_code
from lpc_lightning.policy.memory_efficient_layers import _Normalize
from lpc_lightning.policy.rotary_attention import _RotatedProducts
from lpc_lightning.policy.segment_attention import attend_by_segment, query_blocks
from lpc_lightning.types import LogitHead

SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 2, 2, -1]])


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def rotate(*inputs: Tensor) -> Tensor:
    states, *weights = inputs
    parts = _RotatedProducts.apply(states, draw(2, 6, 4).detach(), draw(2, 6, 4).detach(), *weights, None, None, None)
    return torch.stack(parts)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "norm": (lambda states, weight: _Normalize.apply(states, weight, 1e-6), [draw(2, 3, 4, 8), draw(8)]),
    "attention": (
        lambda *states: attend_by_segment(nn.Identity(), *states, None, blocks=query_blocks(SEGMENTS))[0],
        [draw(2, heads, 6, 4) for heads in (4, 2, 2)],
    ),
    "rotation": (rotate, [draw(2, 6, 16), *(draw(8, 16) for _ in range(3))]),
    "casts": (lambda *weights: torch.stack(_Cast.apply(torch.bfloat16, *weights)), [draw(3, 4), draw(3, 4)]),
    "logps": (
        lambda hidden, weight, codes: token_logps_per_code(
            hidden, torch.arange(7), LogitHead(weight, None, 1.0, None), codes
        ),
        [draw(7, 8), draw(11, 8), draw(3, 8)],
    ),
}


@pytest.mark.parametrize("strides", ["transposed", "expanded"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_strides_of_a_gradient_change_nothing(name: str, strides: str) -> None:
    function, inputs = FUNCTIONS[name]
    out = function(*inputs)
    transposed, column = (draw(*like.shape).detach().to(out.dtype) for like in (out.mT, out[..., :1]))
    upstream = transposed.mT if strides == "transposed" else column.expand_as(out)
    assert not upstream.is_contiguous()
    found, expected = (
        torch.autograd.grad(out, inputs, gradient, retain_graph=True) for gradient in (upstream, upstream.contiguous())
    )
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
