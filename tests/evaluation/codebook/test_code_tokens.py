"""Tests of the tokens that codes raise and lower, against a product in float64 and a sort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from lpc_lightning.evaluation.codebook.code_tokens import code_tokens
from lpc_lightning.policy import CausalPolicy, TinyPolicy


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("chosen", [False, True], ids=["whole vocabulary", "some tokens"])
def test_code_tokens_against_float64(tiny: Callable[..., CausalPolicy], scale: float, chosen: bool) -> None:
    built, tokenizer = tiny(), TinyPolicy().load_tokenizer()
    head = replace(built.head, scale=scale)
    codes = torch.randn(4, built.width, generator=torch.Generator().manual_seed(0))
    among = torch.arange(7, 1000, 13) if chosen else None
    found = code_tokens(head, codes, tokenizer, most=6, among=among)

    weight = built.causal_lm.get_output_embeddings().weight.detach().double().numpy()
    logits = scale * codes.double().numpy() @ weight.T
    ids = range(len(tokenizer)) if among is None else among.tolist()
    assert len(found) == 4
    for code, (raised, lowered) in enumerate(found):
        shift = {token: logits[code, token] - np.mean([row[token] for row in logits]) for token in ids}
        ranked = sorted(ids, key=lambda token: shift[token])
        assert [each.token for each in raised] == ranked[::-1][:6]
        assert [each.token for each in lowered] == ranked[:6]
        for each in (*raised, *lowered):
            assert each.shift == pytest.approx(shift[each.token], rel=1e-4)
            assert each.text == tokenizer.decode([each.token])


def test_code_tokens_of_equal_codes(tiny: Callable[..., CausalPolicy]) -> None:
    built = tiny()
    codes = torch.ones(3, built.width)
    assert code_tokens(built.head, codes, TinyPolicy().load_tokenizer(), most=5) == [([], [])] * 3
