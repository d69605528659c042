"""Columns of type `ClassLabel`, whose cells `datasets` stores as numbers."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpc_lightning.data import Columns
from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.data.sources.locations import open_location
from lpc_lightning.data.sources.reading import read_rows
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.splits import split_names

PEOPLE = datasets.ClassLabel(names=["anna", "ben"])
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("prompt", "left", "right")}
    | {
        "better": datasets.ClassLabel(names=["left", "right"]),
        "split": datasets.ClassLabel(names=["train", "test"]),
        "meta": {"worker": PEOPLE, "seen": datasets.List(PEOPLE)},
    }
)
ROWS: list[dict[str, Any]] = [
    {"better": "right", "split": "train", "meta": {"worker": "ben", "seen": ["ben", "anna"]}},
    {"better": "left", "split": "test", "meta": {"worker": "anna", "seen": []}},
    {"better": "left", "split": "train", "meta": {"worker": None, "seen": None}},
]
ROWS = [{"prompt": f"p{number}", "left": "a", "right": "b", **row} for number, row in enumerate(ROWS)]


@pytest.fixture(params=["parquet", "saved", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    data = datasets.Dataset.from_list(ROWS, features=FEATURES)
    if request.param == "saved":
        data.save_to_disk(str(tmp_path / "saved"))
        return tmp_path / "saved"
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder/train.parquet")
    return tmp_path / "folder" if request.param == "folder" else tmp_path / "folder/train.parquet"


def test_class_labels_are_names(path: Path) -> None:
    assert [row for _, row in read_rows(path)] == ROWS


def test_class_labels_order_the_answers(path: Path) -> None:
    columns = Columns(answer_a="left", answer_b="right", label="better", annotator="meta.worker")
    # "split" marks a row for testing, which a folder with a split `train` of its own refuses.
    source = RowSource(str(path), columns=columns, split_column="none")
    found = [(each.chosen, each.annotator) for each in source.read(DataReport())]
    assert found == [("b", "ben"), ("a", "anna"), ("a", "")]


def test_class_labels_as_split_column(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS, features=FEATURES).to_parquet(tmp_path / "rows.parquet")
    assert split_names(open_location(tmp_path / "rows.parquet")) == {"train", "test"}


def test_class_label_missing(tmp_path: Path) -> None:
    """A label of -1 is a missing one. What other programs have written or changed stays as it is."""
    features = datasets.Features({"label": PEOPLE})
    data = datasets.Dataset(pa.table({"label": [1, -1, None]}, schema=features.arrow_schema))
    data.save_to_disk(str(tmp_path / "saved"))
    assert [row["label"] for _, row in read_rows(tmp_path / "saved")] == ["ben", None, None]
    written = features.arrow_schema.metadata
    for cells, metadata in (([1], {b"huggingface": b"[]"}), ([["ben"], None], written), (["ben"], written)):
        other = pa.table({"label": cells}).replace_schema_metadata(metadata)
        pq.write_table(other, tmp_path / "other.parquet")
        assert [row["label"] for _, row in read_rows(tmp_path / "other.parquet")] == cells
