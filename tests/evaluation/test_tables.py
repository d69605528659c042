"""Tests of Markdown tables, character by character."""

from __future__ import annotations

from lpc_lightning.evaluation.tables import markdown_table, p_value, score


def test_markdown_table_is_padded() -> None:
    text = markdown_table(["task", "base", "a longer name"], [["arc_easy", "0.4321", "0.5"], ["gsm8k", "0.01", "0.25"]])
    assert text == (
        "| task     |   base | a longer name |\n"
        "| -------- | -----: | ------------: |\n"
        "| arc_easy | 0.4321 |           0.5 |\n"
        "| gsm8k    |   0.01 |          0.25 |"
    )


def test_markdown_table_escapes_cells() -> None:
    text = markdown_table(["x"], [["a|b"], ["two\nlines"]])
    assert text == "| x         |\n| --------- |\n| a\\|b      |\n| two lines |"


def test_markdown_table_without_rows() -> None:
    assert markdown_table(["a", "b"], []) == "| a   |   b |\n| --- | --: |"


def test_score_and_p_value() -> None:
    assert score(0.43217) == "0.4322"
    assert score(0.43217, 0.01234) == "0.4322 ± 0.0123"
    assert [p_value(value) for value in (1.0, 0.0314, 0.001, 0.0009)] == ["1.000", "0.031", "0.001", "<0.001"]
