"""Tests of the layouts against a naive computation for each sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lpc_lightning.data.batching.layouts import Layout, PaddedLayout, SharedPrefixLayout
from lpc_lightning.types import PIECES, PreferenceBatch, TokenizedPair

PAD = 7  # a token that answers hold as well: padding is known by its mask alone
LENGTHS = {
    "odd": [(5, 3, 7), (11, 9, 1), (3, 13, 5)],
    "ones": [(1, 1, 1), (1, 1, 6), (4, 1, 2), (1, 8, 1)],
    "one pair": [(6, 2, 4)],
    "many": [(2, 3, 4), (9, 1, 1), (1, 2, 1), (3, 3, 3), (20, 10, 2), (5, 1, 6), (2, 2, 2)],
}
LAYOUTS: dict[str, Layout] = {
    "padded": PaddedLayout(PAD),
    "rows of the longest pair": SharedPrefixLayout(PAD, row_tokens=1),
    "a few pairs a row": SharedPrefixLayout(PAD, row_tokens=40),
    "rows of any width": SharedPrefixLayout(PAD, row_tokens=10_000),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
MakePairs = Callable[..., list[TokenizedPair]]


def seen_from(batch: PreferenceBatch, flat: int) -> list[int]:
    """Return flat positions of the tokens that a position attends to, by the definition in `PreferenceBatch`."""
    width = batch.input_ids.shape[1]
    row, column = divmod(flat, width)
    seen = []
    for other in range(width):
        if not batch.attention_mask[row, other]:
            continue
        if batch.segments is None:
            allowed = True
        else:
            mine, theirs = int(batch.segments[row, column]), int(batch.segments[row, other])
            allowed = theirs == mine or theirs == mine - mine % PIECES
        if allowed and batch.position_ids[row, other] <= batch.position_ids[row, column]:
            seen.append(row * width + other)
    return sorted(seen, key=lambda place: int(batch.position_ids.reshape(-1)[place]))


def check(batch: PreferenceBatch, pairs: list[TokenizedPair]) -> None:
    tokens, positions = batch.input_ids.reshape(-1), batch.position_ids.reshape(-1)
    sequences = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    sequences += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]

    def check_sight(flat: int, text: list[int]) -> None:
        seen = seen_from(batch, flat)
        assert tokens[seen].tolist() == text
        assert positions[seen].tolist() == list(range(len(text)))

    assert batch.owner.shape == batch.targets.shape == batch.read_at.shape == (sum(len(a) for _, a in sequences),)
    assert batch.lengths.tolist() == [len(answer) for _, answer in sequences]
    for number, (prompt, answer) in enumerate(sequences):
        mine = batch.owner == number
        assert batch.targets[mine].tolist() == answer
        for index, flat in enumerate(batch.read_at[mine].tolist()):
            check_sight(flat, prompt + answer[:index])
        check_sight(int(batch.completion_end[number]), prompt + answer)
        check_sight(int(batch.prompt_end[number % len(pairs)]), prompt)

    width = batch.input_ids.shape[1]
    used = batch.attention_mask.sum(1, keepdim=True)
    assert torch.equal(batch.attention_mask, (torch.arange(width) < used).long()), "padding is on the right"
    assert used.max() == width
    assert (batch.input_ids[batch.attention_mask == 0] == PAD).all()
    assert batch.tokens == int(used.sum())


@every_layout
@every_length
def test_read_positions_attend_to_own_prefix(
    layout: Layout, lengths: list[tuple[int, int, int]], make_pairs: MakePairs
) -> None:
    pairs = make_pairs(lengths, vocabulary=10)
    check(layout(pairs), pairs)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.tuples(*[st.integers(1, 12)] * 3), min_size=1, max_size=6),
    row_tokens=st.none() | st.integers(1, 100),
)
@example(lengths=[(1, 1, 1)] * 5, row_tokens=6)
def test_layouts_agree_for_any_lengths(
    lengths: list[tuple[int, int, int]], row_tokens: int | None, make_pairs: MakePairs
) -> None:
    pairs = make_pairs(lengths, vocabulary=10)
    batch = (PaddedLayout(PAD) if row_tokens is None else SharedPrefixLayout(PAD, row_tokens))(pairs)
    check(batch, pairs)
    sizes = [sum(sizes) for sizes in lengths]
    sequences = {(tuple(p.prompt_ids), tuple(answer)) for p in pairs for answer in (p.chosen_ids, p.rejected_ids)}
    if row_tokens is None:
        assert batch.tokens == sum(len(prompt) + len(answer) for prompt, answer in sequences)
    else:
        # Every prompt is there once, if its answers fit into a row.
        least = sum(map(len, {prompt for prompt, _ in sequences})) + sum(len(answer) for _, answer in sequences)
        assert least <= batch.tokens <= sum(sizes)
        assert batch.tokens == least or (
            row_tokens < sum(sizes) and len({prompt for prompt, _ in sequences}) < len(pairs)
        )
        assert batch.input_ids.shape[1] <= max(row_tokens, *sizes)
        assert batch.input_ids.numel() <= len(sizes) * max(sizes), "more padding than in rows of one pair each"


def test_padded_layout_example() -> None:
    pairs = [TokenizedPair("a", [1, 2], [3], [4, 5]), TokenizedPair("b", [6], [8, 9], [9])]
    batch = PaddedLayout(PAD)(pairs)
    assert batch.input_ids.tolist() == [[1, 2, 3, 7], [6, 8, 9, 7], [1, 2, 4, 5], [6, 9, 7, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.position_ids[2].tolist() == [0, 1, 2, 3]
    assert batch.segments is None
    assert batch.read_at.tolist() == [1, 4, 5, 9, 10, 12]
    assert batch.targets.tolist() == [3, 8, 9, 4, 5, 9]
    assert batch.owner.tolist() == [0, 1, 1, 2, 2, 3]
    assert batch.prompt_end.tolist() == [1, 4]
    assert batch.completion_end.tolist() == [2, 6, 11, 13]


def test_shared_prefix_layout_example() -> None:
    pairs = [TokenizedPair("b", [6], [8, 9], [9]), TokenizedPair("a", [1, 2], [3], [4, 5])]
    batch = SharedPrefixLayout(PAD, row_tokens=9)(pairs)
    # The longer pair is first.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 1]]
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 1, 2, 2, PIECES, PIECES + 1, PIECES + 1, PIECES + 2]]
    assert batch.read_at.tolist() == [5, 6, 1, 5, 1, 3]
    assert batch.targets.tolist() == [8, 9, 3, 9, 4, 5]
    assert batch.owner.tolist() == [0, 0, 1, 2, 3, 3]
    assert batch.prompt_end.tolist() == [5, 1]
    assert batch.completion_end.tolist() == [7, 2, 8, 4]
    narrow = SharedPrefixLayout(PAD, row_tokens=8)(pairs)
    assert narrow.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 8, 9, 9, 7]]
    assert narrow.segments is not None
    assert narrow.segments.tolist() == [[0, 0, 1, 2, 2], [0, 1, 1, 2, -1]]


@every_layout
def test_layout_keeps_pair_order(layout: Layout, make_pairs: MakePairs) -> None:
    plain = make_pairs([(2, 1, 1), (9, 9, 9), (4, 2, 3)])
    pairs = [
        replace(pair, id=f"id{n}", source=f"s{n}", factor=f"f{n}", annotator=f"a{n}", flipped=n == 1, has_gold=n == 2)
        for n, pair in enumerate(plain)
    ]
    batch = layout(pairs)
    assert batch.ids == ("id0", "id1", "id2")
    assert batch.sources == ("s0", "s1", "s2")
    assert batch.factors == ("f0", "f1", "f2")
    assert batch.annotators == ("a0", "a1", "a2")
    assert batch.flipped.tolist() == [False, True, False]
    assert batch.has_gold == (False, False, True)
    assert batch.pairs == 3


def test_short_pairs_share_rows_of_a_long_pair(make_pairs: MakePairs) -> None:
    batch = SharedPrefixLayout(PAD, 1)(make_pairs([(4, 3, 2), (10, 5, 3), (4, 2, 3), (10, 4, 4)]))
    assert batch.input_ids.shape == (3, 18)
    assert (batch.prompt_end // 18).tolist() == [2, 0, 2, 1]


def test_rows_widen_to_save_padding(make_pairs: MakePairs) -> None:
    pairs = make_pairs([(10, 5, 5), (6, 4, 4), (10, 5, 5), (6, 4, 4)])
    assert SharedPrefixLayout(PAD, 20)(pairs).input_ids.shape == (4, 20)
    assert SharedPrefixLayout(PAD, 60)(pairs).input_ids.shape == (2, 34)
    assert SharedPrefixLayout(PAD, 60)(make_pairs([(10, 5, 5)] * 4)).input_ids.shape == (4, 20)


@every_layout
def test_batch_to_device_moves_every_tensor(layout: Layout, make_pairs: MakePairs) -> None:
    batch = layout(make_pairs(LENGTHS["odd"]))
    moved = batch.to("meta")
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            assert getattr(moved, field.name).device.type == "meta"
            assert getattr(moved, field.name).shape == value.shape
        else:
            assert getattr(moved, field.name) == value
