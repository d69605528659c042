"""Tests of labels for codes, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from lpc_lightning.evaluation.codebook.code_labels import CodeLabel, label_codes, match_columns

CODES = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
PROMPTS = [f"prompt {number}" for number in range(200)]
FACTORS = ["short", "short", "kind", "kind", "kind", "kind", "short", "formal", "formal", ""]


def test_match_columns_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    codes = np.repeat(np.arange(4), 50)
    related = [f"value {code if keep else 9}" for code, keep in zip(codes, generator.random(200) < 0.8, strict=True)]
    unrelated = [f"value {value}" for value in generator.integers(4, size=200)]
    columns = {"source": unrelated, "factor": related, "annotator": [""] * 200}
    matches = match_columns({"prior": codes}, columns, PROMPTS[:200])
    assert [match.column for match in matches] == ["factor", "source"]
    for match in matches:
        assert match.nmi == pytest.approx(normalized_mutual_info_score(codes, columns[match.column]))
    assert [match.names_codes for match in matches] == [True, False]


def test_match_columns_leaves_out_empty_values() -> None:
    (match,) = match_columns({"prior": CODES}, {"factor": FACTORS}, PROMPTS[: len(CODES)])
    assert match.nmi == pytest.approx(normalized_mutual_info_score(CODES[:9], FACTORS[:9]))
    assert match.purity == pytest.approx(7 / 9)  # 2 of 3, 3 of 3, 2 of 3


def test_match_columns_prefers_the_first_of_equals() -> None:
    codes = np.repeat(np.arange(3), 20)
    names = {"factor": [f"f{code}" for code in codes], "source": [f"s{2 - code}" for code in codes]}
    matches = match_columns({"prior": codes}, names, PROMPTS[: len(codes)])
    assert [match.column for match in matches] == ["factor", "source"]


@pytest.mark.parametrize("count", [4, 8, 32])
def test_random_codes_of_prompts_get_no_names(count: int) -> None:
    """A factor that depends on the prompt, as a conversation does, and codes that the prompts have at random."""
    draw = np.random.default_rng(count)
    prompts = np.repeat(np.arange(54), draw.integers(2, 20, 54))
    for _ in range(10):
        codes, factors = draw.integers(0, count, 54)[prompts], draw.integers(0, 6, 54)[prompts]
        columns = {"factor": [f"factor {each}" for each in factors]}
        (match,) = match_columns({"prior": codes}, columns, [str(each) for each in prompts])
        assert not match.names_codes


def test_label_codes_by_hand() -> None:
    # Overall, 4 of 9 pairs are kind and 3 are short.
    assert label_codes(CODES, FACTORS, "factor") == {
        0: CodeLabel("factor", "short", 2, 3),
        1: CodeLabel("factor", "kind", 3, 3),
        2: CodeLabel("factor", "formal", 2, 3),
    }


def test_label_codes_without_a_majority() -> None:
    # Code 0 has no value of half of its pairs. Code 1 has one, but all pairs have it as often.
    values = ["a", "b", "c", "a", "a", "b"]
    assert label_codes(np.array([0, 0, 0, 1, 1, 1]), values, "source") == {1: CodeLabel("source", "a", 2, 3)}
    assert label_codes(np.array([0, 0]), ["a", "a"], "source") == {}
