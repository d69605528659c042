"""Tests of the choice of held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.algorithms.warm_start.held_out import HeldOut, hold_out


def hold_out_different(prompts: Sequence[int]) -> HeldOut:
    """Hold out some of pairs without copies."""
    held = hold_out(prompts, range(len(prompts)))
    assert held is not None
    return held


def parts(held: HeldOut, prompts: list[int]) -> tuple[list[int], list[int], list[int]]:
    assert sorted(held.order) == list(range(len(prompts)))
    first, last = len(prompts) - held.selection - held.decision, len(prompts) - held.decision
    return held.order[:first], held.order[first:last], held.order[last:]


@given(st.lists(st.integers(0, 60), min_size=6, max_size=80))
def test_hold_out_keeps_prompts_in_one_part(prompts: list[int]) -> None:
    least = max(2, round(len(prompts) / 10))
    held = hold_out_different(prompts)
    fitted, selection, decision = parts(held, prompts)
    assert fitted
    assert min(len(selection), len(decision)) >= least
    shared = [
        {prompts[pair] for pair in first} & {prompts[pair] for pair in second}
        for first, second in ((fitted, selection), (fitted, decision), (selection, decision))
    ]
    whole = held.whole_prompts
    assert not (whole and any(shared))
    if not whole:
        assert (len(selection), len(decision)) == (least, least)
        assert held.order == list(range(len(prompts)))
    else:
        assert len(selection) + len(decision) <= max(2 * least, len(prompts) // 2)


@pytest.mark.parametrize(("pairs", "decision", "selection"), [(6, 2, 2), (20, 5, 2), (400, 40, 40)])
def test_hold_out_keeps_order_of_distinct_prompts(pairs: int, decision: int, selection: int) -> None:
    held = hold_out_different(range(pairs))
    assert (held.order, held.selection, held.decision) == (list(range(pairs)), selection, decision)
    assert held.whole_prompts


def test_hold_out_groups_pairs_of_a_prompt() -> None:
    """Order of prompts: 0 1 2 .. 9 0 1 .. 9. A tenth of 40 pairs is 4. Two of ten prompts decide."""
    held = hold_out_different([number % 10 for number in range(40)])
    assert (held.selection, held.decision, held.whole_prompts) == (4, 8, True)
    assert held.order[:4] == [0, 10, 20, 30]
    assert held.order[-12:] == [7, 17, 27, 37, 8, 18, 28, 38, 9, 19, 29, 39]


def test_hold_out_decides_on_five_prompts() -> None:
    """Of 24 prompts with 50 pairs each, a tenth of the pairs would be three prompts."""
    held = hold_out_different([number % 24 for number in range(1200)])
    assert (held.selection, held.decision, held.whole_prompts) == (150, 250, True)


def test_hold_out_splits_a_single_prompt() -> None:
    held = hold_out_different([7] * 30)
    assert (held.order, held.selection, held.decision) == (list(range(30)), 3, 3)
    assert not held.whole_prompts


@pytest.mark.parametrize(("prompts", "parts"), [(3, (15, 15, False)), (5, (25, 25, False)), (6, (50, 100, True))])
def test_hold_out_decides_on_two_prompts(prompts: int, parts: tuple[int, int, bool]) -> None:
    """A prompt has 50 pairs, more than a tenth of all. Three of five prompts would be more than half of the pairs."""
    held = hold_out_different([number % prompts for number in range(50 * prompts)])
    assert (held.selection, held.decision, held.whole_prompts) == parts


@given(st.lists(st.integers(0, 40), min_size=6, max_size=80))
def test_hold_out_keeps_copies_in_one_part(contents: list[int]) -> None:
    """All pairs have one prompt."""
    held = hold_out([0] * len(contents), contents)
    if held is None:
        assert len(set(contents)) < len(contents), "without copies there are always three parts"
        return
    assert not held.whole_prompts
    fitted, selection, decision = ({contents[pair] for pair in part} for part in parts(held, contents))
    assert len(fitted) + len(selection) + len(decision) == len(set(contents))
    assert fitted
    assert len(decision) >= 2


def test_hold_out_of_few_different_pairs() -> None:
    """A prompt, and copies of six pairs. With four, copies of three would be held out."""
    held = hold_out([7] * 60, [number % 6 for number in range(60)])
    assert held is not None
    assert (held.selection, held.decision, held.whole_prompts) == (10, 20, False)
    assert held.order[-20:] == [*range(4, 60, 6), *range(5, 60, 6)]
    assert hold_out([7] * 60, [number % 4 for number in range(60)]) is None
    assert hold_out([7] * 60, [3] * 60) is None
