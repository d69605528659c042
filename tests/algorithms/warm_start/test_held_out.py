"""Tests of the choice of held-out pairs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.algorithms.warm_start.held_out import hold_out


def parts(prompts: list[int]) -> tuple[list[int], list[int]]:
    order, held = hold_out(prompts)
    assert sorted(order) == list(range(len(prompts)))
    return order[: len(order) - held], order[len(order) - held :]


@given(st.lists(st.integers(0, 60), min_size=2, max_size=80))
def test_hold_out_keeps_prompts_in_one_part(prompts: list[int]) -> None:
    fitted, held = parts(prompts)
    assert len(held) >= max(2, round(len(prompts) / 10))
    if {prompts[pair] for pair in fitted} & {prompts[pair] for pair in held}:
        # Allowed only if the last prompts, which make up a tenth, hold more than half of the pairs.
        last, covered = list(dict.fromkeys(prompts)), 0
        while covered < len(held):
            covered += prompts.count(last.pop())
        assert covered > len(prompts) // 2
        assert len(held) == max(2, round(len(prompts) / 10))


@pytest.mark.parametrize(("pairs", "held"), [(4, 2), (20, 2), (400, 40)])
def test_hold_out_keeps_order_of_distinct_prompts(pairs: int, held: int) -> None:
    assert hold_out(range(pairs)) == (list(range(pairs)), held)


def test_hold_out_groups_pairs_of_a_prompt() -> None:
    """Order of prompts: 0 1 2 .. 9 0 1 .. 9. A tenth of 40 pairs is 4, the pairs of prompt 9."""
    order, held = hold_out([number % 10 for number in range(40)])
    assert held == 4
    assert order[:4] == [0, 10, 20, 30]
    assert order[-4:] == [9, 19, 29, 39]


def test_hold_out_splits_a_single_prompt() -> None:
    assert hold_out([7] * 30) == (list(range(30)), 3)
