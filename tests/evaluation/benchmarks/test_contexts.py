"""Tests of grouped requests: what each position attends to and predicts, compared request by request."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lpc_lightning.evaluation.benchmarks.contexts import (
    ContextBatch,
    Group,
    Request,
    group_by_context,
    kept_context_length,
    lay_out,
    make_batches,
)
from lpc_lightning.types import PIECES

TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple)
REQUESTS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12)


def window(request: Request, max_length: int) -> tuple[list[int], list[int]]:
    """Return context and continuation as stock HFLM reads them. The first expression is copied from HFLM."""
    context, continuation = map(list, request)
    inputs = (context + continuation)[-(max_length + 1) :][:-1]
    return inputs[: len(inputs) - len(continuation) + 1], continuation


def visible_tokens(batch: ContextBatch, flat: int) -> list[int]:
    """Return the tokens that a flat position attends to, by the rules of `PreferenceBatch.segments`, in order."""
    rows = batch.rows
    row, column = divmod(flat, rows.width)
    own = int(rows.segments[row, column])
    visible = [
        (int(rows.position_ids[row, other]), int(rows.input_ids[row, other]))
        for other in range(rows.width)
        if rows.attention_mask[row, other]
        and int(rows.segments[row, other]) in (own, own - own % PIECES)
        and rows.position_ids[row, other] <= rows.position_ids[row, column]
    ]
    visible.sort()
    assert [position for position, _ in visible] == list(range(len(visible)))
    return [token for _, token in visible]


def answered_requests(groups: Sequence[Group]) -> list[tuple[list[int], list[int]]]:
    """Return the context and continuation of each request, in the order of the requests."""
    by_index: dict[int, tuple[list[int], list[int]]] = {}
    for group in groups:
        for continuation, numbers in zip(group.continuations, group.requests, strict=True):
            for number in numbers:
                assert number not in by_index
                by_index[number] = (list(group.context), list(continuation))
    return [by_index[number] for number in range(len(by_index))]


@pytest.mark.slow
@settings(max_examples=200)
@given(requests=REQUESTS, max_length=st.integers(9, 20), max_tokens=st.integers(1, 80))
@example(requests=[((1,), (2,))] * 3, max_length=9, max_tokens=1)
def test_every_request_is_read_once_like_stock(requests: list[Request], max_length: int, max_tokens: int) -> None:
    groups = group_by_context(requests, max_length)
    expected = [window(request, max_length) for request in requests]
    assert answered_requests(groups) == expected
    assert max(group.longest for group in groups) == max(len(one) + len(other) - 1 for one, other in expected)

    all_batches = make_batches(groups, max_tokens)
    assert answered_requests([group for members in all_batches for group in members]) == expected
    for members in all_batches:
        batch = lay_out(members, max_tokens)
        expected_parts = [
            (number, list(group.context), list(continuation))
            for number, group in enumerate(members)
            for continuation in group.continuations
        ]
        assert batch.group.tolist() == [number for number, _, _ in expected_parts]
        for number, (_, context, continuation) in enumerate(expected_parts):
            own = batch.owner == number
            assert batch.targets[own].tolist() == continuation
            for index, flat in enumerate(batch.read_at[own].tolist()):
                assert visible_tokens(batch, flat) == context + continuation[:index]
        for group, flat in zip(members, batch.context_end.tolist(), strict=True):
            assert visible_tokens(batch, flat) == list(group.context)
        assert int(batch.rows.attention_mask.sum()) == sum(group.tokens for group in members)


@given(requests=REQUESTS, max_tokens=st.integers(1, 80))
def test_make_batches_respects_token_limit(requests: list[Request], max_tokens: int) -> None:
    groups = group_by_context(requests, 20)
    room = max(max_tokens, *(group.longest for group in groups))
    all_batches = make_batches(groups, max_tokens)
    assert max(sum(group.tokens for group in members) for members in all_batches) <= room
    sizes = [group.tokens for members in all_batches for group in members]
    assert sizes == sorted(sizes, reverse=True), "batches must be filled from the largest group"


def test_make_batches_keeps_fitting_group_whole() -> None:
    context = tuple(range(30))
    requests = [(context, (choice,) * 4) for choice in range(4)] + [((7,) * 60, (1, 2))]
    longest, shared = group_by_context(requests, 100)[::-1][0], group_by_context(requests, 100)[0]
    assert (longest.longest, shared.tokens) == (61, 42)
    assert [[group.tokens for group in members] for members in make_batches([shared, longest], 61)] == [[61], [42]]


def test_group_shares_context_and_continuations() -> None:
    question, other = (1, 2, 3), (1, 2, 4)
    requests = [(question, (5,)), (question, (5, 6)), (other, (5,)), (question, (5,)), (question, (6, 6, 6))]
    groups = group_by_context(requests, 50)
    assert [group.context for group in groups] == [question, other]
    assert groups[0].continuations == ((5,), (5, 6), (6, 6, 6))
    assert groups[0].requests == ((0, 3), (1,), (4,))
    batch = lay_out(groups, 50)
    assert batch.rows.input_ids.tolist() == [[1, 2, 3, 5, 6, 6, 1, 2, 4]]
    assert batch.rows.segments.tolist() == [[0, 0, 0, 2, 3, 3, PIECES, PIECES, PIECES]]
    assert batch.read_at.tolist() == [2, 2, 3, 2, 4, 5, 8]
    assert batch.targets.tolist() == [5, 5, 6, 6, 6, 6, 5]


def test_group_by_context_truncated_differently() -> None:
    context = (1, 2, 3, 4)
    groups = group_by_context([(context, (5,)), (context, (5, 6)), (context, (6, 6))], 4)
    assert [group.context for group in groups] == [context, (2, 3, 4)]
    assert [group.full_context for group in groups] == [context, context]
    assert [group.continuations for group in groups] == [((5,),), ((5, 6), (6, 6))]


def test_split_long_texts_with_short_context() -> None:
    texts = [((0,), (number,) * 600) for number in range(8)]
    (group,) = group_by_context(texts, 1000)
    assert [part.tokens for part in group.split(8 * 600)] != [8 * 599 + 1]
    assert answered_requests(group.split(8 * 600)) == [(list(one), list(other)) for one, other in texts]


def test_split_more_continuations_than_pieces() -> None:
    context = tuple(range(4000))  # so long that a single row has the lowest cost
    requests = [(context, (number // 100, number % 100)) for number in range(PIECES + 5)]
    (group,) = group_by_context(requests, 5000)
    parts = group.split(100_000)
    assert [len(part.continuations) for part in parts] == [PIECES - 1, 6]
    assert answered_requests(parts) == [(list(one), list(other)) for one, other in requests]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "found 0 context and 1 continuation tokens"),
        (([1], []), "found 1 context and 0 continuation tokens"),
        (([1], [2] * 6), "found a continuation of 6 tokens, expected at most 5"),
    ],
)
def test_kept_context_length_rejects_request(request_: Request, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kept_context_length(request_, 5)


def test_kept_context_length_of_full_continuation() -> None:
    assert kept_context_length(([1, 2, 3], [4] * 5), 5) == 1
