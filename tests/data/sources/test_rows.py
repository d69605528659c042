import csv
import gzip
import json
import math
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.data.sources.locations import open_location
from lpc_lightning.data.sources.reading import read_rows
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import BadRow, DataError, label_text
from lpc_lightning.data.sources.splits import split_names

ROWS = [
    {"prompt": f"p{i}", "chosen": "a\u2028b", "rejected": "c", "meta": {"score": i} if i else "none"} for i in range(3)
]


def source_key(path, split=None):
    return open_location(path).key(split)


def test_read_rows_json_lines(write_rows):
    path = write_rows([ROWS[0], "", json.dumps(ROWS[1]), "   ", ROWS[2]])
    assert list(read_rows(path)) == [
        ("pairs.jsonl line 1", ROWS[0]),
        ("pairs.jsonl line 3", ROWS[1]),
        ("pairs.jsonl line 5", ROWS[2]),
    ]


def test_read_rows_byte_order_mark_and_crlf(tmp_path):
    path = tmp_path / "pairs.ndjson"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    assert [row for _, row in read_rows(path)] == ROWS


def test_read_rows_gzip(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert list(read_rows(path))[2] == ("pairs.jsonl.gz line 3", ROWS[2])
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"pairs\.jsonl\.gz is not a complete gzip file"):
        list(read_rows(path))


@pytest.mark.parametrize("content", [ROWS, {"data": ROWS}])
def test_read_rows_json(tmp_path, content):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(content))
    assert list(read_rows(path)) == [(f"pairs.json row {i}", row) for i, row in enumerate(ROWS, 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": 1}\n{"prompt": 2}', r"pairs\.json line 2 is not JSON: Extra data.*\.jsonl"),
        (b'"text"', "holds a JSON str. Expected a list"),
        (b'{"rows": []}', "holds a JSON dict. Expected a list"),
        (b'["\xff"]', r"pairs\.json row 1: invalid UTF-8: invalid start byte at byte 0 of the text "),
        (b'[{"a": "\xff"}, ', r"pairs\.json is not UTF-8: invalid start byte at byte 8"),
        (b"[]", "holds no rows"),
        (b'[{"a": 1}, 7]', r"pairs\.json row 2: not an object: found a JSON int"),
    ],
)
def test_read_rows_bad_json(tmp_path, content, message):
    path = tmp_path / "pairs.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


def test_read_rows_csv_places(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "chosen", "rejected"], ["two\nlines", "a", "b"], ["x" * 200_000, "é", '"']])
    assert list(read_rows(path)) == [
        ("pairs.csv line 2", {"prompt": "two\nlines", "chosen": "a", "rejected": "b"}),
        ("pairs.csv line 4", {"prompt": "x" * 200_000, "chosen": "é", "rejected": '"'}),
    ]


def test_read_rows_bad_csv(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\na,b\n\na,b,c\n")
    with pytest.raises(DataError, match=r"pairs\.csv line 2: wrong number of fields: found 2 fields, expected 3"):
        list(read_rows(path))
    path.write_text('prompt,chosen\na,"b"c\n')
    with pytest.raises(DataError, match=r"pairs\.csv line 2 is not CSV"):
        list(read_rows(path))
    for header in ("prompt,caf\xe9".encode("latin-1"), "prompt".encode("utf-16")):
        path.write_bytes(header + b"\na,b\n")
        with pytest.raises(DataError, match=r"pairs\.csv line 1: invalid UTF-8: .* of the header\. Save the file as"):
            list(read_rows(path))
    path.write_text("prompt,chosen\n")
    with pytest.raises(DataError, match="holds no rows"):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.json"])
def test_read_rows_partly_latin_1(tmp_path, name):
    """The rows in Latin-1 are bad, with their place and byte. The others are read."""
    rows = [{"prompt": f"caf\u00e9,\n{number}", "chosen": "a"} for number in range(4)]
    path = tmp_path / name
    if name == "pairs.csv":
        lines = ["prompt,chosen\n", *(f'"{row["prompt"]}",{row["chosen"]}\n' for row in rows)]
        places = ["pairs.csv line 4", "pairs.csv line 8"]
    else:
        lines = ["[", *(json.dumps(row, ensure_ascii=False) + ",]"[row is rows[-1]] for row in rows)]
        places = ["pairs.json row 2", "pairs.json row 4"]
    path.write_bytes(b"".join(line.encode(["utf-8", "latin-1"][n % 2 == 0]) for n, line in enumerate(lines)))
    bad_rows: list[tuple[str, BadRow]] = []
    found = [row for _, row in read_rows(path, on_bad=lambda place, fault: bad_rows.append((place, fault)))]
    assert found == [rows[0], rows[2]]
    assert [(place, fault.reason) for place, fault in bad_rows] == [(place, "invalid UTF-8") for place in places]
    with pytest.raises(DataError, match=rf"{places[0]}: invalid UTF-8: invalid continuation byte at byte 3 of the "):
        list(read_rows(path))


def test_read_rows_parquet(tmp_path):
    path = tmp_path / "pairs.parquet"
    rows = [{**row, "meta": {"score": i}, "prompt": [{"role": "user", "content": "hi"}]} for i, row in enumerate(ROWS)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert list(read_rows(path)) == [(f"pairs.parquet row {i}", row) for i, row in enumerate(rows, 1)]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"pairs\.parquet cannot be read as Parquet"):
        list(read_rows(path))


def test_read_rows_bad_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [b'{"a": 1}', b'{"a": ', b'{"a": "\xff"}', b"[1]", b'{"a": 2}', b"[" * 100_000, b"9" * 5000]
    path.write_bytes(b"\n".join(lines))
    bad_rows: list[tuple[str, BadRow]] = []
    rows = [row for _, row in read_rows(path, on_bad=lambda place, fault: bad_rows.append((place, fault)))]
    assert rows == [{"a": 1}, {"a": 2}]
    assert [(place, fault.reason) for place, fault in bad_rows] == [
        ("pairs.jsonl line 2", "invalid JSON"),
        ("pairs.jsonl line 3", "invalid UTF-8"),
        ("pairs.jsonl line 4", "not an object"),
        ("pairs.jsonl line 6", "invalid JSON"),
        ("pairs.jsonl line 7", "invalid JSON"),
    ]
    with pytest.raises(DataError, match=r"pairs\.jsonl line 2: invalid JSON: .*begins with.*data\.bad_rows skip`"):
        list(read_rows(path))


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_read_rows_empty_file(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"pairs\.jsonl holds no rows"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/no/such/folder/pairs.csv", "a/b/c", "~/missing.json.gz"]
)
def test_read_rows_missing_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="There is no file or folder"):
        read_rows(name)


def test_read_rows_bad_extension_and_split(tmp_path, write_rows):
    path = tmp_path / "pairs.xlsx"
    path.write_text("x")
    with pytest.raises(DataError, match=r"found the extension '\.xlsx', expected .*\.jsonl, .*\.parquet"):
        read_rows(path)
    with pytest.raises(DataError, match=r"split='test' for rows that have no splits"):
        read_rows(write_rows(ROWS), split="test")


def test_read_rows_saved_folder(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    one, several = tmp_path / "one", tmp_path / "several"
    datasets.Dataset.from_list(rows).save_to_disk(str(one))
    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows[:1])}).save_to_disk(str(several))
    assert list(read_rows(one))[2] == ("one[train] row 3", rows[2])
    assert list(read_rows(several, split="test")) == [("several[test] row 1", rows[0])]
    with pytest.raises(DataError, match=r"no split 'train'\. It has: test"):
        list(read_rows(several))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "notes.txt").touch()
    with pytest.raises(DataError, match=r"notes\.txt: found the extension '\.txt', expected one of \.jsonl"):
        read_rows(tmp_path / "plain")


def test_read_rows_hub(monkeypatch):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(2)]
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("org/name", config="main", split="test"))[1] == ("org/name[test] row 2", rows[1])
    assert calls == [(("org/name", "main"), {"split": "test"})]
    assert source_key("org/name") == source_key("org/name")
    assert source_key("org/name") != source_key("org/name", split="test")


def test_read_rows_hub_unreachable(monkeypatch, tmp_path):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bars = datasets.are_progress_bars_disabled()
    with pytest.raises(DataError, match=r"no local file org/name, and the hub could not be read .*no route to host"):
        list(read_rows("org/name"))
    assert datasets.are_progress_bars_disabled() == bars


def test_source_key_depends_on_content(write_rows, tmp_path):
    path = write_rows(ROWS)
    key = source_key(path)
    moved = tmp_path / "elsewhere" / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    assert source_key(moved) == source_key(str(moved)) == key
    write_rows(ROWS[:2])
    assert source_key(path) != key


def test_read_rows_expands_home(monkeypatch, write_rows):
    path = write_rows(ROWS)
    monkeypatch.setenv("HOME", str(path.parent))
    assert len(list(read_rows(Path("~") / path.name))) == 3


def test_missing_numbers_of_a_table(tmp_path):
    """pandas writes NaN for missing values, and floats in a column of integers that lacks one."""
    rows = [{"id": 7, "annotator": 3, "split": "train"}, {"id": 8, "annotator": None, "split": None}]
    texts = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", **row} for i, row in enumerate([*rows, {}])]
    records = pd.DataFrame(texts).to_dict("records")
    assert math.isnan(records[1]["annotator"])
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report = DataReport()
    examples = list(RowSource(str(path), split="train").read(report))
    assert [(each.id, each.annotator) for each in examples] == [
        ("7", "3"), ("8", ""), ("pairs.jsonl line 3", ""),
    ]  # fmt: skip
    assert report.other_splits == {}
    assert split_names(open_location(path)) == {"train"}


def test_whole_numbers_of_csv_and_parquet(tmp_path):
    """pandas writes integers as 3.0 if the column lacks one. Cells of CSV are texts."""
    numbers = [3, -2, 0, 123456789012345]
    table = pd.DataFrame(
        {
            "prompt": [f"p{n}" for n in range(5)], "chosen": "3.0", "rejected": "b", "split": [1, 1, 1, 1, math.nan],
            **{name: [*numbers, math.nan] for name in ("annotator", "factor", "source", "id")},
        }
    )  # fmt: skip
    table.to_csv(tmp_path / "gaps.csv", index=False)
    table.to_parquet(tmp_path / "gaps.parquet")
    table.iloc[:4].convert_dtypes().to_csv(tmp_path / "whole.csv", index=False)
    assert (tmp_path / "gaps.csv").read_text().count(",3.0,") > (tmp_path / "whole.csv").read_text().count(",3.0,")
    found = {
        name: [
            (each.annotator, each.factor, each.source, each.id, each.chosen)
            for each in RowSource(str(tmp_path / name), split="1").read(DataReport())
        ]
        for name in ("gaps.csv", "gaps.parquet", "whole.csv")
    }
    expected = [(*[str(number)] * 4, "3.0") for number in numbers]
    assert found == dict.fromkeys(found, expected)


@pytest.mark.parametrize("text", ["3.10", "3.05", "v3.0", "3.0.0", "03.0", "1e3", "3.", ".0", "٣.0", "9" * 5000 + ".0"])
def test_labels_that_are_no_whole_numbers(text):
    assert label_text(text) == text


@pytest.mark.parametrize(
    "cells",
    [
        {name: [{"role": "user", "content": "p"}, {"role": "assistant", "content": name}] for name in "ab"},
        {name: f"\n\nHuman: p\n\nAssistant: {name}" for name in "ab"},
    ],
    ids=["messages", "rendered"],
)
def test_missing_prompt_of_conversations(cells, write_rows):
    path = write_rows([{"prompt": math.nan, "chosen": cells["a"], "rejected": cells["b"]}])
    (example,) = RowSource(str(path)).read(DataReport())
    assert ([turn["content"] for turn in example.prompt], example.chosen) == (["p"], "a")


def test_missing_answers_beside_labelled_ones(write_rows):
    row = {"prompt": "p", "chosen": math.nan, "rejected": math.nan, "response_0": "a", "response_1": "b"}
    (example,) = RowSource(str(write_rows([row | {"better_response_id": 1.0}]))).read(DataReport())
    assert (example.chosen, example.rejected) == ("b", "a")


def test_split_of_whole_numbers(write_rows):
    """A column of splits 0 and 1 in a table that lacks one of them."""
    path = write_rows(
        [{"prompt": "p", "chosen": "a", "rejected": "b", "split": split} for split in (0.0, 1.0, math.nan)]
    )
    assert split_names(open_location(path)) == {"0", "1"}
    assert len(list(RowSource(str(path), split="1").read(DataReport()))) == 1
