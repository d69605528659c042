"""Packing against its own words: every item once, rows within their width, cheaper than the obvious other ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.data.batching.packing import Piece, cheapest_rows, fill, last_of, pack, place_families, predictors
from lpc_lightning.types import PIECES

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), room=st.integers(0, 60))
def test_pack_items_once_and_no_two_rows_fit_in_one(sizes: list[int], room: int) -> None:
    width = max(sizes) + room
    rows = pack(sizes, width)
    assert sorted(number for members in rows for number in members) == list(range(len(sizes)))
    used = sorted(sum(sizes[number] for number in members) for members in rows)
    assert used[-1] <= width
    assert len(used) == 1 or used[0] + used[1] > width


def cost(rows: list[list[int]], sizes: list[int], shared: int) -> float:
    """In units of one token's linear layers, to which attention adds as much again at a width of 2048."""
    widest = max(sum(sizes[number] for number in members) for members in rows) + shared
    return len(rows) * (widest + widest**2 / 2048)


@given(sizes=SIZES, most=st.integers(1, 200), shared=st.integers(1, 400))
def test_cheapest_rows_cost_at_most_separate_rows(sizes: list[int], most: int, shared: int) -> None:
    rows = cheapest_rows(sizes, most, shared)
    assert sorted(number for members in rows for number in members) == list(range(len(sizes)))
    widest = max(sum(sizes[number] for number in members) for members in rows) + shared
    assert widest <= max(most, shared + max(sizes))
    assert cost(rows, sizes, shared) <= cost([[number] for number in range(len(sizes))], sizes, shared) + 1e-9


@pytest.mark.parametrize(
    ("sizes", "shared", "rows"),
    [
        ([20] * 8, 300, 1),  # choices behind a long context
        ([2000] * 4, 1, 4),  # long texts behind one token: attention would cost more than is saved
        ([0] * 9, 7, 1),  # continuations of one token: nothing of them is read
    ],
)
def test_cheapest_rows_with_shared_tokens(sizes: list[int], shared: int, rows: int) -> None:
    assert len(cheapest_rows(sizes, 10_000, shared)) == rows


def test_place_families_with_empty_pieces() -> None:
    families = [([5, 6], [[7], [], [8, 9]]), ([1, 2, 3], [[4, 4, 4, 4]])]
    placed = place_families(families, row_tokens=12)
    rows = fill((piece for prompt, rest in placed for piece in (prompt, *rest)), pad_id=99)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8, 9]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 2, 3]]
    first, second = [0] * 3 + [1] * 4, [PIECES] * 2 + [PIECES + 1] + [PIECES + 3] * 2
    assert rows.segments.tolist() == [first + second]
    assert rows.attention_mask.all()
    prompt, (one, nothing, two) = placed[0]
    assert last_of(prompt, 12) == 8
    assert predictors(prompt, one, 2, 12).tolist() == [8, 9]
    assert predictors(prompt, nothing, 1, 12).tolist() == [8]
    assert predictors(prompt, two, 2, 12).tolist() == [8, 10]

    narrow = place_families(families, row_tokens=1)
    assert [prompt.row for prompt, _ in narrow] == [1, 0]


def test_fill_pads_on_the_right() -> None:
    rows = fill([Piece([1, 2, 3], 0, 0, 0, 0), Piece([4], 1, 0, 5, PIECES)], pad_id=9)
    assert rows.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert rows.position_ids.tolist() == [[0, 1, 2], [5, 0, 0]]
    assert rows.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert rows.segments.tolist() == [[0, 0, 0], [PIECES, -1, -1]]
    assert rows.input_ids.dtype == torch.int64
