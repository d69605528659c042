"""Tests of CSV files that are complete or absent."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pandas
import pytest

from lpc_lightning.files.csv_files import write_csv


def test_write_csv_of_records_with_other_names(tmp_path: Path) -> None:
    """pandas reads the same texts and numbers back, and an empty cell where a record has no value."""
    path = tmp_path / "a.csv"
    records: list[dict[str, Any]] = [{"name": 'a, "b"\nc', "x": 0.1 + 0.2}, {"x": None, "y": 3, "name": "ä"}]
    write_csv(path, records)
    table = pandas.read_csv(path)
    assert list(table.columns) == ["name", "x", "y"]
    assert list(table["name"]) == [record["name"] for record in records]
    assert table["x"][0] == records[0]["x"]
    assert table.isna().to_numpy().tolist() == [[False, False, True], [False, True, False]]


def test_write_csv_without_records(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [], ["name", "x"])
    table = pandas.read_csv(tmp_path / "a.csv")
    assert list(table.columns) == ["name", "x"]
    assert table.empty


def test_write_csv_of_a_bad_record_keeps_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [{"x": 1}])
    with pytest.raises(csv.Error):
        write_csv(path, [{"x": Unprintable()}])
    assert path.read_text() == "x\n1\n"
    assert list(tmp_path.iterdir()) == [path]


class Unprintable:
    """A value without a text."""

    def __str__(self) -> str:
        raise csv.Error
