"""Votes and gold labels that name an answer by its column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.data.sources.columns import Columns
from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.data.sources.formats import to_example
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow, Tie


def row(**meta: Any) -> dict[str, Any]:
    return {"prompt": "Which?", "chosen": "first", "rejected": "second", "meta": meta}


def example(cells: dict[str, Any], **columns: Any) -> tuple[str, str, bool]:
    """Return both answers, and whether the label counts as wrong."""
    pair = to_example(cells, "x line 1", Columns(**columns))
    return pair.chosen, pair.rejected, pair.flipped


def test_gold_marks_wrong_labels() -> None:
    """Labels are votes, and an entry says which answer is right."""
    assert example(row(gold="chosen"), gold="meta.gold") == ("first", "second", False)
    assert example(row(gold="rejected"), gold="meta.gold") == ("first", "second", True)
    assert example(row(gold="rejected")) == ("first", "second", False)


def test_gold_labels_are_noted() -> None:
    assert to_example(row(gold="chosen"), "x line 1", Columns(gold="meta.gold")).has_gold
    assert to_example(row(gold="chosen"), "x line 1", Columns(gold="chosen")).has_gold
    assert not to_example(row(gold="chosen"), "x line 1", Columns(vote="meta.gold")).has_gold


def test_vote_orders_the_answers() -> None:
    """The column `chosen` holds the majority's answer, and training uses one vote."""
    settings = {"vote": "meta.one_vote", "gold": "chosen"}
    assert example(row(one_vote="chosen"), **settings) == ("first", "second", False)
    assert example(row(one_vote="rejected"), **settings) == ("second", "first", True)
    assert example(row(one_vote="rejected"), vote="meta.one_vote") == ("second", "first", False)
    both = {"vote": "meta.vote", "gold": "meta.gold"}
    assert example(row(vote="rejected", gold="rejected"), **both) == ("second", "first", False)


def test_vote_in_a_column_of_its_own() -> None:
    cells = {"prompt": "Which?", "good": "first", "bad": "second", "vote": "bad", "truth": "good"}
    settings = {"chosen": "good", "rejected": "bad", "vote": "vote", "gold": "truth"}
    assert example(cells, **settings) == ("second", "first", True)


def test_vote_in_a_flattened_table() -> None:
    """A table in which `meta.vote` is a column, as pandas writes nested rows into a CSV file."""
    cells = {
        "prompt": "Which?",
        "chosen": "first",
        "rejected": "second",
        "meta.vote": "rejected",
        "meta.gold": "rejected",
    }
    assert example(cells, vote="meta.vote") == ("second", "first", False)
    assert example(cells, gold="meta.gold") == ("first", "second", True)
    assert example({**cells, "meta": {"vote": "chosen"}}, vote="meta.vote") == ("second", "first", False)
    assert example(row(**{"one.vote": "rejected"}), vote="meta.one.vote") == ("second", "first", False)


@pytest.mark.parametrize("setting", ["vote", "gold"])
@pytest.mark.parametrize("neither", ["equal", "", None])
def test_vote_for_neither_answer(setting: str, neither: str | None, tmp_path: Path) -> None:
    with pytest.raises(Tie):
        example(row(label=neither), **{setting: "meta.label"})
    rows = [row(label=label) for label in ("chosen", neither, "rejected")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(cells) + "\n" for cells in rows))
    report = DataReport()
    source = RowSource(str(tmp_path / "pairs.jsonl"), columns=Columns(**{setting: "meta.label"}))
    assert len(list(source.read(report))) == 2
    assert report.dropped == {"tie": 1}


@pytest.mark.parametrize("setting", ["vote", "gold"])
def test_missing_vote_names_the_setting(setting: str) -> None:
    with pytest.raises(BadRow, match=rf"found no entry 'meta\.none'.*Set data\.columns\.{setting} to an entry that"):
        example(row(label="chosen"), **{setting: "meta.none"})
