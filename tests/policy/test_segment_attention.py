"""Tests of attention by segment against attention over whole rows with a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lpc_lightning.data.batching.layouts import SharedPrefixLayout
from lpc_lightning.policy import CausalPolicy, segment_attention
from lpc_lightning.policy.checks import check_policy
from lpc_lightning.policy.masks import visible_pairs
from lpc_lightning.policy.segment_attention import attend_by_segment, query_blocks
from lpc_lightning.types import PIECES, PreferenceBatch, TokenizedPair

LENGTHS = [(5, 3, 7), (11, 9, 1), (1, 1, 4), (3, 13, 5)]
MakePairs = Callable[..., list[TokenizedPair]]


def whole_rows(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float) -> Tensor:
    """Compute the softmax over all tokens of a row, with hidden ones at minus infinity."""
    groups = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def draw(
    batch: PreferenceBatch, heads: int = 4, groups: int = 2, width: int = 3, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Draw random queries, keys and values."""
    rows, tokens = batch.input_ids.shape
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(rows, n, tokens, width, generator=generator).double() for n in (heads, groups, groups)]
    return [states.to(dtype).requires_grad_() for states in drawn]


def by_segment(states: list[Tensor], batch: PreferenceBatch, scaling: float) -> Tensor:
    assert batch.segments is not None
    return attend_by_segment(nn.Identity(), *states, None, blocks=query_blocks(batch.segments), scaling=scaling)[0]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    row_tokens=st.integers(1, 90),
    block=st.integers(1, 12),
    product=st.sampled_from([1, 40, 400]),
    padding=st.sampled_from([0, 20, 400]),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 4)]),
)
def test_segment_attention_equals_masked_rows(
    lengths: list[tuple[int, int, int]],
    row_tokens: int,
    block: int,
    product: int,
    padding: int,
    heads: tuple[int, int],
    make_pairs: MakePairs,
) -> None:
    batch = SharedPrefixLayout(0, row_tokens)(make_pairs(lengths))
    assert batch.segments is not None
    states, tokens = draw(batch, *heads), batch.segments >= 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_attention, "BLOCK", block)
        patch.setattr(segment_attention, "PRODUCT", product)
        patch.setattr(segment_attention, "PADDING", padding)
        ours = by_segment(states, batch, 0.3)
        weights = torch.linspace(-1, 1, ours[tokens].numel(), dtype=torch.float64).view_as(ours[tokens])
        found = torch.autograd.grad((weights * ours[tokens]).sum(), states)
    theirs = whole_rows(*states, visible_pairs(batch.segments, batch.position_ids, None), 0.3)
    expected = torch.autograd.grad((weights * theirs[tokens]).sum(), states)
    torch.testing.assert_close(ours[tokens], theirs[tokens], rtol=1e-12, atol=1e-12)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """A pair alone, and the same pair beside others of other lengths."""
    generator = torch.Generator().manual_seed(0)
    whole, pairs = [], []
    for number, lengths in enumerate([(37, 61, 23), (80, 9, 130), (5, 47, 49), (64, 64, 64), (11, 200, 3)]):
        segments = torch.repeat_interleave(torch.arange(3) + number * PIECES, torch.tensor(lengths))[None]
        states = [torch.randn(1, heads, sum(lengths), 16, generator=generator).to(dtype) for heads in (6, 2, 2)]
        whole.append((segments, *states))
        pairs.append(attend_by_segment(nn.Identity(), *states, None, blocks=query_blocks(segments))[0])
    segments, *states = (torch.cat(parts, dim=-1 if parts[0].ndim == 2 else 2) for parts in zip(*whole, strict=True))
    together = attend_by_segment(nn.Identity(), *states, None, blocks=query_blocks(segments))[0]
    alone = torch.cat(pairs, dim=1)
    # Products of other shapes may add up in another order: an element in 10,000 may round to the next bfloat16.
    torch.testing.assert_close(together, alone, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
    assert dtype == torch.float32 or (together != alone).float().mean() < 1e-4


@given(
    lengths=st.lists(st.tuples(*(st.integers(1, 400) for _ in range(3))), min_size=1, max_size=12),
    number=st.integers(1, 8),
)
def test_groups_hold_every_query_in_few_products(lengths: list[tuple[int, int, int]], number: int) -> None:
    counts = torch.tensor(lengths * number).flatten()
    starts = torch.arange(len(counts) // 3)[:, None] * PIECES + torch.arange(3)
    groups = query_blocks(starts.flatten().repeat_interleave(counts)[None]).groups
    blocks = [block for group in groups for block in group.blocks]
    assert sorted(q for block in blocks for q in range(block.first, block.last)) == list(range(int(counts.sum())))
    sizes = [(len(g.blocks), max(b.queries for b in g.blocks), max(b.keys for b in g.blocks)) for g in groups]
    for (count, queries, keys), group in zip(sizes, groups, strict=True):
        scores = count * queries * keys
        padding = scores - sum(block.queries * block.keys for block in group.blocks)
        assert count == 1 or scores <= segment_attention.PRODUCT
        assert padding <= max(segment_attention.PADDING, scores // 8)
    # Equal blocks are together, as many as a product takes.
    alike = [(block.queries, block.keys) for block in blocks]
    for queries, keys in set(alike):
        most = max(1, segment_attention.PRODUCT // (segment_attention.BLOCK * keys))
        holding = sum(any((b.queries, b.keys) == (queries, keys) for b in group.blocks) for group in groups)
        assert holding <= alike.count((queries, keys)) // most + 2


def test_gradcheck(make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_attention, "BLOCK", 2)
    batch = SharedPrefixLayout(0, 20)(make_pairs([(3, 2, 4), (1, 1, 2)]))
    assert torch.autograd.gradcheck(lambda *states: by_segment(list(states), batch, 0.5), draw(batch, width=2))


def test_padding_has_zero_outputs_and_gradients(make_pairs: MakePairs) -> None:
    batch = SharedPrefixLayout(0, 1)(make_pairs([(3, 2, 4), (1, 1, 2)]))
    assert batch.segments is not None
    padding = batch.segments < 0
    assert padding.any()
    states = draw(batch)
    out = by_segment(states, batch, 0.5)
    assert (out[padding] == 0).all()
    for gradient in torch.autograd.grad(out.sum(), states):
        assert (gradient.transpose(1, 2)[padding] == 0).all()


def test_bfloat16_is_as_exact_as_torch_kernel(make_pairs: MakePairs) -> None:
    batch = SharedPrefixLayout(0, None)(make_pairs([(60, 40, 70), (110, 30, 20)]))
    assert batch.segments is not None
    visible = visible_pairs(batch.segments, batch.position_ids, None)
    rounded = [2 * states.detach() for states in draw(batch, 6, 2, 16, torch.bfloat16)]
    exact = [states.double().requires_grad_() for states in rounded]
    exact_values = whole_rows(*exact, visible, 0.25)
    weights = torch.randn(exact_values.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    gradients = torch.autograd.grad((weights.double() * exact_values).sum(), exact)

    def errors(out: Tensor, states: list[Tensor]) -> list[float]:
        found = [out.detach(), *torch.autograd.grad((weights * out).sum(), states)]
        apart = zip(found, [exact_values.detach(), *gradients], strict=True)
        return [float((mine.double() - other).norm() / other.norm()) for mine, other in apart]

    ours = [states.requires_grad_() for states in rounded]
    repeated = [ours[0], *(states.repeat_interleave(3, dim=1) for states in ours[1:])]
    torchs = nn.functional.scaled_dot_product_attention(*repeated, attn_mask=visible, scale=0.25).transpose(1, 2)
    for mine, theirs in zip(errors(by_segment(ours, batch, 0.25), ours), errors(torchs, ours), strict=True):
        assert mine < 2 * theirs


def test_queries_are_cast_to_type_of_values(make_pairs: MakePairs) -> None:
    """Compare with inputs cast as autocast casts them for sdpa. Rotary embeddings return float32."""
    batch = SharedPrefixLayout(0, 40)(make_pairs(LENGTHS))
    query, key, value = draw(batch, dtype=torch.float32)
    mixed = by_segment([query, key, value.bfloat16()], batch, 0.5)
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, by_segment([query.bfloat16(), key.bfloat16(), value.bfloat16()], batch, 0.5))


def test_autocast_does_not_round_scores(make_pairs: MakePairs) -> None:
    batch = SharedPrefixLayout(0, 40)(make_pairs(LENGTHS))
    states = [states.bfloat16() for states in draw(batch, dtype=torch.float32)]
    plain = by_segment(states, batch, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(by_segment(states, batch, 0.5), plain)


def test_saved_tensors_are_linear_in_tokens(make_pairs: MakePairs) -> None:
    batch = SharedPrefixLayout(0, 2000)(make_pairs([(300, 200, 200), (300, 200, 200)]))
    states, kept = draw(batch, width=8), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        by_segment(states, batch, 0.5)
    assert kept == sum(tensor.numel() for tensor in states)


@pytest.fixture(scope="module")
def kernels(tiny: Callable[..., CausalPolicy]) -> dict[str, CausalPolicy]:
    """One policy with each kernel for packed rows on a CPU."""
    return {name: tiny("llama", attention=name) for name in ("segment", "sdpa", "eager")}


def test_kernels_agree(
    kernels: dict[str, CausalPolicy], make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = segment_attention._Attention.apply
    monkeypatch.setattr(segment_attention._Attention, "apply", lambda *inputs: calls.append(0) or real(*inputs))
    batch = SharedPrefixLayout(0, 35)(make_pairs(LENGTHS))
    found = {}
    for name, policy in kernels.items():
        before = len(calls)
        logps = policy(batch).logps()
        weights = torch.linspace(-1, 1, len(logps), dtype=torch.float64)
        found[name] = [logps, *torch.autograd.grad((weights * logps).sum(), list(policy.parameters()))]
        assert (len(calls) - before) == (2 if name == "segment" else 0), "one call per layer, by this kernel only"
    for name in ("segment", "eager"):
        # The softmax of transformers' eager kernel is in float32.
        tolerance = 1e-9 if name == "segment" else 1e-4
        for mine, theirs in zip(found[name], found["sdpa"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_checkpointed_layers_have_same_gradients(kernels: dict[str, CausalPolicy], make_pairs: MakePairs) -> None:
    policy, batch = kernels["segment"], SharedPrefixLayout(0, 35)(make_pairs(LENGTHS))
    weights = list(policy.parameters())
    plain = torch.autograd.grad(policy(batch).logps().sum(), weights)
    policy.set_gradient_checkpointing(True)
    try:
        again = torch.autograd.grad(policy(batch).logps().sum(), weights)
    finally:
        policy.set_gradient_checkpointing(False)
    for mine, theirs in zip(again, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_unpacked_rows_and_generation_use_sdpa(kernels: dict[str, CausalPolicy]) -> None:
    ours, theirs = (kernels[name].causal_lm for name in ("segment", "sdpa"))
    tokens = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert torch.equal(ours(tokens, attention_mask=mask).logits, theirs(tokens, attention_mask=mask).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))


def test_saved_config_omits_kernel(kernels: dict[str, CausalPolicy]) -> None:
    """Check that transformers alone can open an exported folder."""
    assert "segment" not in kernels["segment"].causal_lm.config.to_json_string()


@pytest.mark.parametrize(
    ("family", "by_segment"), [("llama", True), ("gpt2", True), ("mistral", False), ("gemma2", False)]
)
def test_attends_by_segment_per_family(family: str, by_segment: bool, tiny: Callable[..., CausalPolicy]) -> None:
    policy = tiny(family)
    assert policy.attends_by_segment == by_segment
    assert policy.takes_block_mask


def test_family_that_drops_blocks_uses_mask(
    tiny: Callable[..., CausalPolicy], make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny("llama")
    batch = SharedPrefixLayout(0, 35)(make_pairs(LENGTHS))
    expected = policy(batch).logps()
    forward = policy.backbone.forward
    monkeypatch.setattr(policy.backbone, "forward", lambda blocks=None, **inputs: forward(**inputs))
    monkeypatch.setattr(CausalPolicy, "_takes_positions", True, raising=False)
    fallback = CausalPolicy.__new__(CausalPolicy)
    nn.Module.__init__(fallback)
    fallback.model, fallback._takes_positions = policy.model, True
    fallback._logit_scaling = policy._logit_scaling
    fallback.attends_by_segment = False
    alone = check_policy(fallback)
    fallback.attends_by_segment = fallback._can_attend_by_segment(alone)
    assert not fallback.attends_by_segment
    assert fallback._applies_block_mask(alone)
    torch.testing.assert_close(fallback(batch).logps(), expected, rtol=1e-9, atol=1e-9)
