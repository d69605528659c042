"""Tests of masks against the visibility rule, applied token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from lpc_lightning.data.batching.layouts import SharedPrefixLayout
from lpc_lightning.policy.masks import additive_mask, block_mask, layer_windows, visible_blocks, visible_pairs
from lpc_lightning.types import PIECES


def naive_visible(segments: list[int], positions: list[int], window: int | None) -> list[list[bool]]:
    """Return rows of booleans: True at (q, k) if q sees k. Segments are numbered prompt, chosen, rejected."""
    rows = []
    for q, mine in enumerate(segments):
        row = []
        for k, theirs in enumerate(segments):
            if mine == -1:
                visible = theirs == -1 and k <= q
            elif mine % PIECES == 0:
                visible = theirs == mine and k <= q
            else:
                visible = (theirs == mine and k <= q) or (theirs == mine - mine % PIECES and theirs != -1)
            if visible and window is not None:
                visible = positions[q] - positions[k] < window
            row.append(visible)
        rows.append(row)
    return rows


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=4),
    row_tokens=st.integers(1, 40),
    window=st.none() | st.integers(1, 7),
)
def test_visible_pairs_follow_the_rule(lengths, row_tokens, window, make_pairs) -> None:
    batch = SharedPrefixLayout(0, row_tokens)(make_pairs(lengths))
    found = visible_pairs(batch.segments, batch.position_ids, window)
    assert found.shape == (len(batch.segments), 1, *[batch.segments.shape[1]] * 2)
    for row, mask in enumerate(found[:, 0]):
        assert mask.tolist() == naive_visible(batch.segments[row].tolist(), batch.position_ids[row].tolist(), window)
    assert found.any(-1).all(), "softmax is NaN for a token that sees no key"


@pytest.mark.parametrize(
    ("family", "options", "windows"),
    [
        ("llama", {}, {"full_attention": None}),
        ("mistral", {"sliding_window": 6}, {"sliding_attention": 6}),
        ("mistral", {"sliding_window": None}, {"full_attention": None}),
        ("gpt2", {}, {"full_attention": None}),
        ("qwen2", {"num_hidden_layers": 2}, {"full_attention": None}),
        (
            "qwen2",
            {"num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
            {"full_attention": None, "sliding_attention": 5},
        ),
        ("gemma2", {"num_hidden_layers": 2, "sliding_window": 7}, {"full_attention": None, "sliding_attention": 7}),
        ("llama4_text", {"num_hidden_layers": 4}, None),
    ],
)
def test_layer_windows(family, options, windows) -> None:
    assert layer_windows(AutoConfig.for_model(family, **options)) == windows


@pytest.mark.parametrize("kernel", ["sdpa", "segment", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_additive_block_mask(dtype, kernel, make_pairs) -> None:
    batch = SharedPrefixLayout(0, 30)(make_pairs([(4, 3, 2), (2, 5, 3)]))
    config = AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=3)
    scores = block_mask(batch.segments, batch.position_ids, config, kernel, dtype)
    assert set(scores) == {"full_attention", "sliding_attention"}
    for kind, window in (("full_attention", None), ("sliding_attention", 3)):
        visible = visible_pairs(batch.segments, batch.position_ids, window)
        assert scores[kind].dtype == dtype
        assert (scores[kind][visible] == 0).all()
        assert (scores[kind][~visible] == torch.finfo(dtype).min).all()
    assert (scores["full_attention"] != scores["sliding_attention"]).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_additive_mask_equals_boolean(dtype, make_pairs) -> None:
    batch = SharedPrefixLayout(0, 30)(make_pairs([(4, 3, 2), (2, 5, 3)]))
    mask = additive_mask(batch.segments, batch.position_ids, None, dtype)
    visible = visible_pairs(batch.segments, batch.position_ids, None)
    generator = torch.Generator().manual_seed(0)
    rows, _, tokens, _ = visible.shape
    states = [torch.randn(rows, 2, tokens, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    results = []
    for each in (mask, visible):
        out = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=each)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), states)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_layers_without_mask_are_refused(make_pairs) -> None:
    batch = SharedPrefixLayout(0, 30)(make_pairs([(4, 3, 2)]))
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"data\.layout: .* for llama4_text, .* Expected padded"):
        block_mask(batch.segments, batch.position_ids, config, "sdpa", torch.float32)


@pytest.mark.parametrize("window", [None, 90])
def test_block_mask_of_flex_attention(window, make_pairs) -> None:
    batch = SharedPrefixLayout(0, 700)(make_pairs([(20, 300, 290), (140, 130, 20)]))
    config = AutoConfig.for_model("mistral", sliding_window=window)
    found = block_mask(batch.segments, batch.position_ids, config, "flex_attention", torch.float32)
    visible = visible_pairs(batch.segments, batch.position_ids, window)[:, 0]
    rows, width = batch.segments.shape
    places = torch.meshgrid(*(torch.arange(size) for size in (rows, width, width)), indexing="ij")
    assert torch.equal(found.mask_mod(places[0], torch.tensor(0), *places[1:]), visible)
    sides = -(-width // 128)
    assert sides >= 3
    padded = torch.zeros(rows, 128 * sides, 128 * sides, dtype=torch.bool)
    padded[:, :width, :width] = visible
    expected = padded.view(rows, sides, 128, sides, 128).any(4).any(2)
    listed = found.to_dense()[:, 0].bool()
    assert not (expected & ~listed).any()
    assert listed.sum() <= 1.5 * expected.sum()
    assert not expected.tril().equal(torch.ones(rows, sides, sides, dtype=torch.bool).tril()), "no block is skipped"


@pytest.mark.parametrize("seed", range(8))
def test_visible_blocks_cover_all_visible_pairs(seed: int, make_pairs) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 500, (int(torch.randint(1, 8, (), generator=generator)), 3), generator=generator)
    batch = SharedPrefixLayout(0, None)(make_pairs([tuple(row) for row in sizes.tolist()]))
    padding = -batch.segments.shape[1] % 128 + 128 * (seed % 3)
    segments = torch.nn.functional.pad(batch.segments, (0, padding), value=-1)
    positions = torch.nn.functional.pad(batch.position_ids, (0, padding))
    partly, fully = visible_blocks(segments, None)
    count = partly.shape[-1]
    tiles = visible_pairs(segments, positions, None).view(count, 128, count, 128).transpose(1, 2)
    assert not (tiles.any((2, 3)) & ~(partly | fully)[0]).any()
    assert tiles[fully[0]].all()
    assert not (partly & fully).any()
