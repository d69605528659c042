"""Logits of generation in bfloat16, against the same states and z in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lpc_lightning.inference.modeling_lpc import HEAD_ROWS, head_product
from tests.inference.conftest import CODES, FAMILIES

NEW = 5
IN_BFLOAT16 = {
    "weights": ("bfloat16", nullcontext),
    "autocast": ("float32", lambda: torch.autocast("cpu", torch.bfloat16)),
}
arithmetic = pytest.mark.parametrize(("dtype", "precision"), IN_BFLOAT16.values(), ids=IN_BFLOAT16)


def expected_logits(stock: Any, states: Tensor, z: Tensor, precision: Callable[[], Any]) -> Tensor:
    """Return (rows, V) cap(scale (head(h) + W z)): the head in its own type, everything after it in float64."""
    head, config = stock.get_output_embeddings(), stock.config
    with precision():
        product = head(states)[:, -1]
    assert product.dtype == torch.bfloat16
    logits = product.double() + z.double() @ head.weight.double().T
    logits = logits * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


@torch.no_grad()
@arithmetic
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_bfloat16_add_z_in_float32(
    family: str,
    dtype: str,
    precision: Callable[[], Any],
    make_latent: Callable[..., Any],
    prompts: list[Tensor],
    padded: Callable[..., Any],
) -> None:
    latent = make_latent(family, dtype=dtype)
    model = latent.model
    model.latent_prior.float()  # as in training under every precision
    weights = torch.rand(len(prompts), CODES, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    handle = latent.stock.get_decoder().register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with precision():
        out = model.generate(**padded(prompts), code_weights=weights, **options)
    handle.remove()
    z = weights.double() @ model.latent_prior.codebook.double()
    assert len(seen) == len(out.logits) == NEW
    for states, found in zip(seen, out.logits, strict=True):
        expected = expected_logits(latent.stock, states[:, -1:], z, precision)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    answer = out.sequences[:, -NEW:]
    assert answer.tolist() == torch.stack([logits.argmax(-1) for logits in out.logits], dim=1).tolist()


@torch.no_grad()
def test_product_with_a_head_in_parts() -> None:
    head = torch.nn.Linear(4, 2 * HEAD_ROWS + 5, dtype=torch.bfloat16)
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = z.double() @ head.weight.double().T
    torch.testing.assert_close(head_product(head, z, torch.bfloat16).double(), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_code_biases_of_bfloat16_weights(make_latent: Callable[..., Any], prompts: list[Tensor]) -> None:
    latent = make_latent(dtype="bfloat16")
    prior, head = latent.model.latent_prior.float(), latent.stock.get_output_embeddings()
    expected = prior.codebook.double() @ head.weight.double().T
    torch.testing.assert_close(latent.model.code_biases().double(), expected, rtol=1e-5, atol=1e-5)
    processor, ids = latent.model.logits_processor(prompts[0][None], prior_mode=2), prompts[0][None]
    found = processor(ids, latent.stock(input_ids=ids).logits[:, -1].float())
    torch.testing.assert_close(found, latent.model(input_ids=ids, prior_mode=2).logits[:, -1].log_softmax(-1))
