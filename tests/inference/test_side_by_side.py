"""Columns of text, to the letter."""

from __future__ import annotations

from lpc_lightning.inference.side_by_side import side_by_side


def test_columns_wrap_to_their_share_of_the_width() -> None:
    texts = {"prior": "one two three four five six seven", "code 3": "short"}
    assert side_by_side(texts, 51) == (
        "prior                    | code 3\n"
        "------------------------ | ------------------------\n"
        "one two three four five  | short\n"
        "six seven                |"
    )


def test_line_breaks_and_empty_lines_stay() -> None:
    assert side_by_side({"prior": "one\n\n  two"}, 30) == f"prior\n{'-' * 30}\none\n\n  two"


def test_narrow_columns_are_stacked() -> None:
    texts = {"prior": "one two three", "code 3": "four"}
    assert side_by_side(texts, 50) == f"prior\n{'-' * 50}\none two three\n\ncode 3\n{'-' * 50}\nfour"


def test_words_longer_than_a_column_are_broken() -> None:
    lines = side_by_side({"a": "x" * 30, "b": ""}, 51).splitlines()
    assert lines[2:] == ["x" * 24 + " |", "x" * 6 + " " * 18 + " |"]
