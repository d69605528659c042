"""Grouped requests: what each place to read sees and predicts, spelled out request by request."""

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
    """Context and continuation as stock HFLM reads them (its own expression, and what is scored of it)."""
    context, continuation = map(list, request)
    read = (context + continuation)[-(max_length + 1) :][:-1]
    return read[: len(read) - len(continuation) + 1], continuation


def seen_from(batch: ContextBatch, flat: int) -> list[int]:
    """Tokens that a place may look at, by the words of `PreferenceBatch.segments`, in order of position."""
    rows = batch.rows
    row, column = divmod(flat, rows.width)
    mine = int(rows.segments[row, column])
    seen = [
        (int(rows.position_ids[row, other]), int(rows.input_ids[row, other]))
        for other in range(rows.width)
        if rows.attention_mask[row, other]
        and int(rows.segments[row, other]) in (mine, mine - mine % PIECES)
        and rows.position_ids[row, other] <= rows.position_ids[row, column]
    ]
    seen.sort()
    assert [position for position, _ in seen] == list(range(len(seen)))
    return [token for _, token in seen]


def answered(groups: Sequence[Group]) -> list[tuple[list[int], list[int]]]:
    """Context and continuation by the number of the request."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for group in groups:
        for continuation, numbers in zip(group.continuations, group.requests, strict=True):
            for number in numbers:
                assert number not in found
                found[number] = (list(group.context), list(continuation))
    return [found[number] for number in range(len(found))]


@settings(max_examples=200)
@given(requests=REQUESTS, max_length=st.integers(9, 20), most=st.integers(1, 80))
@example(requests=[((1,), (2,))] * 3, max_length=9, most=1)
def test_every_request_is_read_once_as_stock_reads_it(requests: list[Request], max_length: int, most: int) -> None:
    groups = group_by_context(requests, max_length)
    expected = [window(request, max_length) for request in requests]
    assert answered(groups) == expected
    assert max(group.longest for group in groups) == max(len(one) + len(other) - 1 for one, other in expected)

    plan = make_batches(groups, most)
    assert answered([group for members in plan for group in members]) == expected
    for members in plan:
        batch = lay_out(members, most)
        wanted = [
            (number, list(group.context), list(continuation))
            for number, group in enumerate(members)
            for continuation in group.continuations
        ]
        assert batch.group.tolist() == [number for number, _, _ in wanted]
        for number, (_, context, continuation) in enumerate(wanted):
            mine = batch.owner == number
            assert batch.targets[mine].tolist() == continuation
            for index, flat in enumerate(batch.read_at[mine].tolist()):
                assert seen_from(batch, flat) == context + continuation[:index]
        for group, flat in zip(members, batch.context_end.tolist(), strict=True):
            assert seen_from(batch, flat) == list(group.context)
        assert int(batch.rows.attention_mask.sum()) == sum(group.tokens for group in members)


@given(requests=REQUESTS, most=st.integers(1, 80))
def test_a_batch_holds_no_more_than_its_tokens_or_those_of_the_longest_sequence(
    requests: list[Request], most: int
) -> None:
    groups = group_by_context(requests, 20)
    room = max(most, *(group.longest for group in groups))
    plan = make_batches(groups, most)
    assert max(sum(group.tokens for group in members) for members in plan) <= room
    sizes = [group.tokens for members in plan for group in members]
    assert sizes == sorted(sizes, reverse=True), "the largest first: what fits, fits at once"


def test_a_batch_of_one_sequence_still_shares_what_fits() -> None:
    context = tuple(range(30))
    requests = [(context, (choice,) * 4) for choice in range(4)] + [((7,) * 60, (1, 2))]
    longest, shared = group_by_context(requests, 100)[::-1][0], group_by_context(requests, 100)[0]
    assert (longest.longest, shared.tokens) == (61, 42)
    assert [[group.tokens for group in members] for members in make_batches([shared, longest], 61)] == [[61], [42]]


def test_choices_share_their_context_and_equal_ones_each_other() -> None:
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


def test_contexts_cut_to_different_lengths_are_different_contexts() -> None:
    context = (1, 2, 3, 4)
    groups = group_by_context([(context, (5,)), (context, (5, 6)), (context, (6, 6))], 4)
    assert [group.context for group in groups] == [context, (2, 3, 4)]
    assert [group.full_context for group in groups] == [context, context]
    assert [group.continuations for group in groups] == [((5,),), ((5, 6), (6, 6))]


def test_long_texts_behind_one_token_are_not_put_into_one_row() -> None:
    texts = [((0,), (number,) * 600) for number in range(8)]
    (group,) = group_by_context(texts, 1000)
    assert [part.tokens for part in group.split(8 * 600)] != [8 * 599 + 1]
    assert answered(group.split(8 * 600)) == [(list(one), list(other)) for one, other in texts]


def test_more_continuations_than_a_row_has_numbers_for() -> None:
    context = tuple(range(4000))  # so long that a single row would be cheapest
    requests = [(context, (number // 100, number % 100)) for number in range(PIECES + 5)]
    (group,) = group_by_context(requests, 5000)
    parts = group.split(100_000)
    assert [len(part.continuations) for part in parts] == [PIECES - 1, 6]
    assert answered(parts) == [(list(one), list(other)) for one, other in requests]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (([], [1]), "found 0 context and 1 continuation tokens"),
        (([1], []), "found 1 context and 0 continuation tokens"),
        (([1], [2] * 6), "found a continuation of 6 tokens, expected at most 5"),
    ],
)
def test_requests_that_cannot_be_scored(request_: Request, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kept_context_length(request_, 5)


def test_a_continuation_as_long_as_the_window_keeps_one_token_of_context() -> None:
    assert kept_context_length(([1, 2, 3], [4] * 5), 5) == 1
