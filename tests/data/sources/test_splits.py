import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.data.sources.splits import first_held_out, held_out, pair_rank, prompt_rank, select_split, split_of
from lpc_lightning.types import Message, PreferenceExample


def test_split_of_missing_value():
    assert [split_of(row) for row in ({}, {"split": None}, {"split": ""}, {"split": "test"})] == [
        "train",
        "train",
        "train",
        "test",
    ]


def test_select_split_reports_other_splits():
    rows = [("1", {"part": "train"}), ("2", {"part": "test"}), ("3", {}), ("4", {"part": "val"})]
    others: list[str] = []
    assert [place for place, _ in select_split(rows, "train", "part", others.append)] == ["1", "3"]
    assert others == ["test", "val"]


@given(st.text())
def test_held_out_grows_with_share(prompt):
    sides = [held_out(prompt_rank(prompt), share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert sides == sorted(sides)
    assert not sides[0]
    assert sides[-1]
    assert prompt_rank([{"role": "user", "content": prompt}]) == prompt_rank(prompt)


@given(st.text(), st.text(), st.text())
def test_rank_of_a_pair_ignores_its_label(prompt, chosen, rejected):
    turns = (Message(role="user", content=prompt),)
    pair, swapped = (PreferenceExample("", turns, *answers) for answers in ((chosen, rejected), (rejected, chosen)))
    assert pair_rank(pair) == pair_rank(swapped)
    assert pair_rank(pair) != pair_rank(replace(pair, chosen=chosen + "x"))


def test_held_out_share():
    ranks = [prompt_rank(f"question {number}") for number in range(4000)]
    assert sum(held_out(rank, 0.1) for rank in ranks) == pytest.approx(400, abs=100)


def test_ranks_of_a_release_stay():
    """Another rank would move prompts between training and validation."""
    text = json.dumps([0, [["user", "How do I boil an egg?"]]])
    rank = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
    assert prompt_rank(" How do I boil an egg?\n") == rank


def test_held_out_share_out_of_range():
    with pytest.raises(ValueError, match=r"data\.validation_share: found 1\.5, .*between 0 and 1"):
        held_out(prompt_rank("x"), 1.5)


@given(st.lists(st.text(), max_size=12))
def test_first_held_out_of_few_prompts(prompts):
    ranks = [prompt_rank(prompt) for prompt in prompts]
    selected = [rank for rank in ranks if held_out(rank, 0.05)]
    lowest = first_held_out(ranks, 0.05)
    if selected or len({prompt.strip() for prompt in prompts}) < 2:
        assert lowest is None
    else:
        assert lowest == min(ranks)
