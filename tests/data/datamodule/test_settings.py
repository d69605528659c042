"""Tests of settings out of range, and of columns with other names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lpc_lightning.data import ByAnnotator, Columns, DataError, PreferenceData
from tests.data.datamodule.conftest import row, tiny


def test_columns_with_other_names(data: Any, write_rows: Any) -> None:
    rows = [{"question": "Why?", "good": "So.", "bad": "No.", "rater": "anna", "key": "pair 1"}]
    columns = Columns(prompt="question", chosen="good", rejected="bad", annotator="rater", id="key")
    pairs = data(write_rows(rows), columns=columns, validation_share=0.0).load("train", tiny().load_tokenizer())
    assert (pairs[0].id, pairs[0].annotator) == ("pair 1", "anna")


def test_columns_within_a_column(data: Any, write_rows: Any) -> None:
    rows = [{**row(n), "meta": {"rater": f"r{n}", "topic": "tea", "of": {"nr": n}, "sure": n / 2}} for n in range(3)]
    columns = Columns(
        annotator="meta.rater", source="meta.topic", factor="meta.topic", id="meta.of.nr", weight="meta.sure"
    )
    pairs = data(write_rows(rows), columns=columns, validation_share=0.0).load("train", tiny().load_tokenizer())
    found = [(pair.id, pair.annotator, pair.source, pair.factor, pair.weight) for pair in pairs]
    assert found == [(str(n), f"r{n}", "tea", "tea", n / 2) for n in range(3)]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"weight": "wieght"}, "weight='wieght'"),
        ({"annotator": "meta.rater", "id": "key", "margin": None}, "annotator='meta.rater', id='key'"),
        ({"factor": "topic"}, "factor='topic'"),  # empty in all rows
        ({"named_in_prompt": "annotator"}, "named_in_prompt='annotator'"),
    ],
    ids=str,
)
def test_columns_without_a_value(columns: Any, found: str, data: Any, write_rows: Any) -> None:
    rows = [
        {**row(n), "meta": {"topic": "tea"}, "topic": "", "split": split} for n, split in enumerate(("train", "dev"))
    ]
    pairs, tokenizer = data(write_rows(rows), columns=Columns(**columns)), tiny().load_tokenizer()
    with pytest.raises(DataError, match=re.escape(f"data.columns: found no value in any row for {found}, expected")):
        pairs.load("train", tokenizer)
    pairs.load("validation", tokenizer)
    assert f"without a value in any row: {found}" in str(pairs.reports["validation"])


def test_columns_with_a_value_in_one_row(data: Any, write_rows: Any) -> None:
    rows = [row(0), {**row(1), "rater": "anna"}]
    pairs = data(
        write_rows(rows), columns=Columns(annotator="rater", named_in_prompt="annotator"), validation_share=0.0
    )
    assert pairs.load("train", tiny().load_tokenizer()).annotators == ["", "anna"]


def test_settings_as_numpy_numbers(data: Any, write_rows: Any, tmp_path: Path) -> None:
    """As in a loop over `np.arange`: the same pairs and the same entry of the cache as with numbers of Python."""

    def fingerprint(whole: Any, real: Any) -> str:
        columns = Columns(score_chosen="good", score_rejected="bad", margin_alpha=real(0.5))
        limits = {"max_length": whole(512), "max_prompt_length": whole(256), "batch_size": whole(8)}
        made = data(rows, columns=columns, validation_share=real(0.25), **limits)
        return str(made.load("train", tiny().load_tokenizer()).fingerprint)

    rows = write_rows([{**row(n), "good": 2.0, "bad": 1.0} for n in range(20)])
    assert fingerprint(np.int64, np.float32) == fingerprint(int, float)
    assert len([entry for entry in (tmp_path / "cache" / "tokens").iterdir() if entry.is_dir()]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size: found 0, expected at least 1"),
        ({"num_workers": -1}, r"data\.num_workers: found -1, expected at least 0"),
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
