from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.tokenization.lengths import (
    EQUAL_AFTER_CUT,
    NO_ROOM_FOR_ANSWERS,
    NO_ROOM_FOR_PROMPT,
    PAIR_TOO_LONG,
    PROMPT_TOO_LONG,
    LengthPolicy,
)
from lpc_lightning.types import TokenizedPair

ids = st.lists(st.integers(0, 9), min_size=1, max_size=12)
pairs = st.builds(TokenizedPair, id=st.just("x"), prompt_ids=ids, chosen_ids=ids, rejected_ids=ids)
limits = st.none() | st.integers(1, 20)


def pair(prompt: int, chosen: int, rejected: int) -> TokenizedPair:
    return TokenizedPair("row 7", list(range(prompt)), list(range(50, 50 + chosen)), list(range(70, 70 + rejected)))


@given(pairs, limits, limits, st.sampled_from(["drop", "truncate_prompt", "truncate_answer"]))
def test_lengths_results_fit_the_limits(given_pair, max_length, max_prompt_length, too_long):
    policy = LengthPolicy(max_length, max_prompt_length, too_long)
    fitted = policy(given_pair, bos_id=0)
    fits = (max_prompt_length is None or len(given_pair.prompt_ids) <= max_prompt_length) and (
        max_length is None
        or len(given_pair.prompt_ids) + max(len(given_pair.chosen_ids), len(given_pair.rejected_ids)) <= max_length
    )
    assert fits == (fitted.pair is given_pair)
    assert [fits, bool(fitted.dropped), bool(fitted.cut)].count(True) == 1
    assert (fitted.pair is None) == bool(fitted.dropped)
    if fitted.pair is not None:
        longer = max(len(fitted.pair.chosen_ids), len(fitted.pair.rejected_ids))
        assert max_length is None or len(fitted.pair.prompt_ids) + longer <= max_length
        assert max_prompt_length is None or len(fitted.pair.prompt_ids) <= max_prompt_length
        assert fitted.pair.prompt_ids
        assert fitted.pair.chosen_ids
        assert fitted.pair.rejected_ids


def test_drop_names_the_limit():
    policy = LengthPolicy(max_length=10, max_prompt_length=5)
    assert policy(pair(6, 1, 1)).dropped == PROMPT_TOO_LONG
    assert policy(pair(5, 2, 6)).dropped == PAIR_TOO_LONG
    assert policy(pair(5, 2, 5)).pair == pair(5, 2, 5)


def test_truncate_prompt_refuses_written_names():
    """A prompt with a name or a marker has a question. It is used if it is short enough, and not if it is cut."""
    marked = replace(pair(9, 6, 3), question="of the prompt without the marker")
    policy = LengthPolicy(max_length=10, too_long="truncate_prompt")
    for bos_id, cut in ((None, 5), (0, 5)):
        with pytest.raises(DataError, match=rf"^Pair 'row 7': data\.too_long: truncate_prompt would cut {cut} of 9 to"):
            policy(marked, bos_id)
    assert LengthPolicy(max_length=15, too_long="truncate_prompt")(marked).pair == marked
    assert LengthPolicy(max_length=6, too_long="truncate_prompt")(marked).dropped == NO_ROOM_FOR_PROMPT
    assert LengthPolicy(max_length=10, too_long="drop")(marked).dropped == PAIR_TOO_LONG


def test_truncate_prompt_keeps_end_and_bos():
    policy = LengthPolicy(max_length=10, too_long="truncate_prompt")
    long = pair(9, 6, 3)
    assert policy(long).pair.prompt_ids == [5, 6, 7, 8]
    assert policy(long, bos_id=0).pair.prompt_ids == [0, 6, 7, 8]
    assert policy(long, bos_id=0).cut == "prompt"
    assert policy(long, bos_id=0).pair.chosen_ids == long.chosen_ids
    assert LengthPolicy(max_length=100, max_prompt_length=2, too_long="truncate_prompt")(long).pair.prompt_ids == [7, 8]


def test_truncate_prompt_keeps_the_prompts_hash():
    """Longer answers leave less of the same prompt."""
    policy = LengthPolicy(max_length=10, too_long="truncate_prompt")
    fitted = [policy(pair(9, answer, 1)).pair for answer in (6, 3, 1)]
    assert [len(each.prompt_ids) for each in fitted] == [4, 7, 9]
    assert {each.prompt for each in fitted} == {pair(9, 1, 1).prompt}


def test_truncate_prompt_drops_bos_that_marks_turns():
    turns = TokenizedPair("x", [1, 5, 6, 1, 7, 8], [2] * 4, [3])
    assert LengthPolicy(max_length=7, too_long="truncate_prompt")(turns, bos_id=1).pair.prompt_ids == [1, 7, 8]
    assert LengthPolicy(max_length=6, too_long="truncate_prompt")(turns, bos_id=1).pair.prompt_ids == [7, 8]


@pytest.mark.parametrize(("answer", "bos"), [(10, None), (12, None), (9, 0)])
def test_truncate_prompt_without_room_drops_pair(answer, bos):
    policy = LengthPolicy(max_length=10, too_long="truncate_prompt")
    assert policy(pair(9, answer, 1), bos).dropped == NO_ROOM_FOR_PROMPT


def test_truncate_answer_keeps_the_start():
    policy = LengthPolicy(max_length=10, max_prompt_length=10, too_long="truncate_answer")
    fitted = policy(pair(7, 5, 2))
    assert fitted.pair.chosen_ids == [50, 51, 52]
    assert fitted.pair.rejected_ids == [70, 71]
    assert fitted.cut == "answers"
    assert policy(pair(11, 1, 1)).dropped == PROMPT_TOO_LONG
    assert policy(pair(10, 1, 1)).dropped == NO_ROOM_FOR_ANSWERS
    assert policy(TokenizedPair("x", [1] * 8, [5, 6, 7], [5, 6, 8])).dropped == EQUAL_AFTER_CUT


def test_error_names_row_lengths_and_limits():
    policy = LengthPolicy(max_length=10, too_long="error")
    with pytest.raises(DataError, match=r"'row 7': pair longer .* 8 prompt tokens .* 5 and 3; max_length=10.*drop"):
        policy(pair(8, 5, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "data.max_length: found 0, expected"),
        ({"max_prompt_length": -1}, "data.max_prompt_length: found -1, expected"),
        ({"too_long": "truncate"}, "data.too_long: found 'truncate', expected .*truncate_prompt"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        LengthPolicy(**settings)
