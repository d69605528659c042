"""Tests of settings out of range, and of columns with other names."""

from __future__ import annotations

from typing import Any

import pytest

from lpc_lightning.data import ByAnnotator, Columns, PreferenceData
from tests.data.datamodule.conftest import tiny


def test_columns_with_other_names(data: Any, write_rows: Any) -> None:
    rows = [{"question": "Why?", "good": "So.", "bad": "No.", "rater": "anna", "key": "pair 1"}]
    columns = Columns(prompt="question", chosen="good", rejected="bad", annotator="rater", id="key")
    pairs = data(write_rows(rows), columns=columns, validation_share=0.0).load("train", tiny().load_tokenizer())
    assert (pairs[0].id, pairs[0].annotator) == ("pair 1", "anna")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size: found 0, expected at least 1"),
        ({"eval_batch_size": -1}, r"data\.eval_batch_size: found -1, expected at least 1"),
        ({"row_tokens": 0}, r"data\.row_tokens: found 0, expected at least 1"),
        (
            {"batch_order": ByAnnotator(3), "batch_size": 8},
            r"pairs_per_annotator: found 3, expected a divisor of data\.batch_size \(8\)",
        ),
        ({"max_length": 0}, r"data\.max_length: found 0, expected a number of tokens from 1 on"),
        ({"validation_share": 1.0}, r"data\.validation_share: found 1\.0, expected a share from 0 to below 1"),
        ({"path": {"test": "a.jsonl"}}, r"data\.path: found files for \['test'\], expected train"),
        ({"path": {"train": "a.jsonl", "dev": "b.jsonl"}}, r"data\.path: found files for \['dev', 'train'\]"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceData(**({"path": "pairs.jsonl"} | settings))
