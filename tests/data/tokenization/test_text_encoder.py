"""The ids that an encoder keeps."""

from __future__ import annotations

import tracemalloc
from typing import Any

from lpc_lightning.data.tokenization.text_encoder import TextEncoder


def test_encoder_keeps_no_long_texts(tokenizers: Any) -> None:
    """Thirty texts of 5,000 tokens are not kept: they would take 1.2 MB as references to ids alone."""
    encoder = TextEncoder(tokenizers["chatml"], [])
    encoder.ids("hello")
    tracemalloc.start()
    try:
        for number in range(30):
            assert len(encoder.ids(f"{number} " + "hello there egg 1 " * 1000)) > 5000
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 300_000


def test_encoder_encodes_repeated_texts_once(fresh: Any) -> None:
    tokenizer = fresh("chatml")
    encoder = TextEncoder(tokenizer, [])
    ids = encoder.ids("hello there")
    ids.append(-1)  # a caller's change of the list
    tokenizer.add_tokens(["there"])  # a second encoding would differ
    assert encoder.ids("hello there") == ids[:-1]
    assert encoder.ids("hello there again") == tokenizer("hello there again")["input_ids"]
