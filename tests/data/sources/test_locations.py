"""Files, patterns, lists, folders and JSON files of splits, each with the rows and the places that they hold."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lpc_lightning.data import PreferenceData
from lpc_lightning.data.datamodule import require_part
from lpc_lightning.data.sources.example_source import RowSource
from lpc_lightning.data.sources.locations import open_location
from lpc_lightning.data.sources.reading import read_rows
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.data.sources.splits import split_names


def rows(*numbers: int) -> list[dict[str, Any]]:
    return [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in numbers]


def write(path: Path, *numbers: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(*numbers)))
    return path


def places(path: Any, split: str | None = None) -> list[tuple[str, str]]:
    return [(place, row["prompt"]) for place, row in read_rows(path, split=split)]


def test_pattern_of_files(tmp_path: Path) -> None:
    for name, number in (("b.jsonl", 2), ("a.jsonl", 1), ("deep/c.jsonl", 3)):
        write(tmp_path / name, number)
    (tmp_path / "notes.txt").touch()
    expected = [("a.jsonl line 1", "p1"), ("b.jsonl line 1", "p2")]
    assert places(f"{tmp_path}/*.jsonl") == expected
    assert places(f"{tmp_path}/**/*.jsonl") == [*expected, ("c.jsonl line 1", "p3")]
    assert places([f"{tmp_path}/deep/*", str(tmp_path / "a.jsonl")]) == [("c.jsonl line 1", "p3"), expected[0]]
    with pytest.raises(DataError, match=r"There is no file .*\*\.csv"):
        read_rows(f"{tmp_path}/*.csv")
    with pytest.raises(DataError, match=r"There is no file .*missing\.jsonl"):
        read_rows([f"{tmp_path}/a.jsonl", f"{tmp_path}/missing.jsonl"])
    with pytest.raises(DataError, match=r"notes\.txt: found the extension"):
        read_rows(f"{tmp_path}/*")


def test_file_twice_in_a_list(tmp_path: Path) -> None:
    one = write(tmp_path / "deep/down/one.jsonl", 1)
    (tmp_path / "link.jsonl").symlink_to(one)
    for path in ([str(one), str(one)], [str(one), f"{tmp_path}/**/*.jsonl"]):
        with pytest.raises(DataError, match=r"one\.jsonl: found the file twice in a list, expected each file once"):
            read_rows(path)
    with pytest.raises(DataError, match=r"link\.jsonl: found the file twice in a list, also as .*one\.jsonl"):
        read_rows([str(one), f"{tmp_path}/*.jsonl"])
    assert places(f"{tmp_path}/**/**/one.jsonl") == [("one.jsonl line 1", "p1")]


def test_folder_in_a_list(tmp_path: Path) -> None:
    write(tmp_path / "folder/train.jsonl", 1)
    files = [str(write(tmp_path / "one.jsonl", 1)), f"{tmp_path}/folder"]
    with pytest.raises(DataError, match=r"folder: found a folder in a list of files, expected .*folder/\*\.jsonl"):
        read_rows(files)


def test_saved_folder_with_a_format(tmp_path: Path) -> None:
    """The format leaves out the answers."""
    made = datasets.Dataset.from_list(rows(0, 1)).with_format("numpy", columns=["prompt"])
    made.save_to_disk(tmp_path / "saved")
    assert [row for _, row in read_rows(tmp_path / "saved")] == rows(0, 1)


@pytest.mark.parametrize("split", [None, "train"])
def test_saved_folder_with_a_replaced_file(tmp_path: Path, split: str | None) -> None:
    """The key of a cache follows the rows, not the fingerprint in the folder."""

    def save(name: str, number: int) -> Path:
        made = datasets.Dataset.from_list(rows(number))
        (made if split is None else datasets.DatasetDict({split: made})).save_to_disk(tmp_path / name)
        return next((tmp_path / name).rglob("*.arrow"))

    source = RowSource(str(tmp_path / "one"), split=split)
    one, other = save("one", 1), save("other", 2)
    key = source.key()
    assert key == RowSource(source.path, split=split).key()
    one.write_bytes(other.read_bytes())
    assert key != source.key()


def test_pattern_is_a_file_name(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs[1].jsonl", 1)
    assert places(str(path)) == [("pairs[1].jsonl line 1", "p1")]


def test_files_of_one_name_have_other_places(tmp_path: Path) -> None:
    files = [str(write(tmp_path / folder / "x.jsonl", n)) for n, folder in enumerate("ab")]
    assert places(files) == [("a/x.jsonl line 1", "p0"), ("b/x.jsonl line 1", "p1")]
    assert open_location(files).key(None) != open_location(files[::-1]).key(None)


def test_folder_of_parquet_shards(tmp_path: Path) -> None:
    """A data set as downloaded from the hub, compared with what `datasets` reads from it."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    shards = {"train-00000-of-00002": (0, 1), "train-00001-of-00002": (2,), "test-00000-of-00001": (3, 4)}
    for name, numbers in shards.items():
        pq.write_table(pa.Table.from_pylist(rows(*numbers)), folder / "data" / f"{name}.parquet")
    for split in ("train", "test"):
        stock = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path / "cache"))
        assert [row for _, row in read_rows(folder, split=split)] == stock.to_list()
    assert places(folder)[2] == ("train-00001-of-00002.parquet row 1", "p2")
    location = open_location(folder)
    assert split_names(location) == {"train", "test"}
    assert location.key("train") != location.key("test")
    with pytest.raises(DataError, match=r"set has no split 'dev'\. It has: train, test\. Set the split \(data\.tr"):
        places(folder, "dev")


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (["train.jsonl", "extra.jsonl"], "extra.jsonl"),
        (["a.jsonl", "b.jsonl", "c.csv"], "c.csv"),
        (["train_2023.jsonl", "dev.jsonl", "2024.jsonl"], "2024.jsonl"),
        (["helpful/train.jsonl", "helpful/test.jsonl", "red/team.jsonl"], "red/team.jsonl"),
        (["train.jsonl", *(f"{n}.jsonl" for n in range(7))], "0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl and 2 more"),
    ],
)
def test_folder_names_its_unread_files(tmp_path: Path, names: list[str], unread: str) -> None:
    for number, name in enumerate(names):
        write(tmp_path / name, number)
    with pytest.warns(UserWarning, match=rf"no row of {re.escape(unread)} is read") as caught:
        location = open_location(tmp_path)
    read = {row["prompt"] for split in split_names(location) for _, row in location.rows(split, lambda *_: None)}
    assert len(caught) == 1
    assert len(read) == len(names) - (7 if "more" in unread else 1)


def test_folder_names_files_of_other_configs(tmp_path: Path) -> None:
    listed = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    for number, name in enumerate("ab"):
        write(tmp_path / f"{name}.jsonl", number)
    with pytest.warns(UserWarning, match=r"no row of b\.jsonl is read, .* no split of the configuration 'a'"):
        location = open_location(tmp_path, "a")
    assert [row["prompt"] for _, row in location.rows("train", lambda *_: None)] == ["p0"]


@pytest.mark.parametrize("kind", ["file", "pattern", "list", "json", "saved", "saved splits"])
def test_config_of_rows_without_one(tmp_path: Path, kind: str) -> None:
    """Only a hub data set, and a folder in its layout, have configurations."""
    one = write(tmp_path / "one.jsonl", 1)
    paths: dict[str, Any] = {"file": one, "pattern": f"{tmp_path}/*.jsonl", "list": [str(one)]}
    paths |= {"json": tmp_path / "splits.json", "saved": tmp_path / "saved", "saved splits": tmp_path / "dict"}
    paths["json"].write_text(json.dumps({"train": rows(1)}))
    datasets.Dataset.from_list(rows(1)).save_to_disk(paths["saved"])
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows(1))).save_to_disk(paths["saved splits"])
    with pytest.raises(
        DataError, match=r"found config='other' for .*, which have no conf.* Remove it \(`data\.config`"
    ):
        read_rows(paths[kind], config="other")
    assert [row["prompt"] for _, row in read_rows(paths[kind])] == ["p1"]


def test_folder_whose_files_are_all_read(tmp_path: Path) -> None:
    """Descriptions and hidden copies are no rows."""
    write(tmp_path / "train.jsonl", 1)
    write(tmp_path / ".ipynb_checkpoints" / "train-checkpoint.jsonl", 1)
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert places(tmp_path) == [("train.jsonl line 1", "p1")]  # a warning is an error


def test_saved_folder_names_its_unread_files(tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_list(rows(1))).save_to_disk(str(tmp_path))
    assert len(places(tmp_path)) == 1
    write(tmp_path / "extra.jsonl", 2)
    with pytest.warns(UserWarning, match=r"no row of extra\.jsonl is read"):
        places(tmp_path)


def test_hub_data_set_is_validated_on_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in the layout of the hub takes the place of the hub. `datasets` itself names its splits."""
    for split, numbers in (("train", (0, 1)), ("validation", (2,))):
        write(tmp_path / "remote" / f"{split}.jsonl", *numbers)
    load, names = datasets.load_dataset, datasets.get_dataset_split_names
    remote, cache = str(tmp_path / "remote"), str(tmp_path / "cache")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *_, split: load(remote, split=split, cache_dir=cache))
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, *_: names(remote))
    monkeypatch.chdir(tmp_path)
    data = PreferenceData("org/name")
    found = {stage: list(require_part(data.source(stage)).read(DataReport())) for stage in ("train", "validation")}
    assert {stage: [each.prompt[0]["content"] for each in found[stage]] for stage in found} == {
        "train": ["p0", "p1"],
        "validation": ["p2"],
    }
    monkeypatch.delattr(datasets, "get_dataset_split_names")
    with pytest.raises(DataError, match=r"the hub could not be read for its splits.*data\.config, data\.train_split"):
        PreferenceData("org/name").source("validation")


def test_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty cannot be read as a data set: .*It holds: nothing"):
        read_rows(tmp_path / "empty")


def test_json_with_splits(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"train": rows(0, 1), "test": rows(2)}, indent=1))
    assert places(path) == [("pairs.json[train] row 1", "p0"), ("pairs.json[train] row 2", "p1")]
    assert places(path, "test") == [("pairs.json[test] row 1", "p2")]
    assert split_names(open_location(path)) == {"train", "test"}
    assert open_location(path).key("train") != open_location(path).key("test")
    with pytest.raises(DataError, match=r"no split 'dev'\. It has: train, test"):
        places(path, "dev")


@pytest.mark.parametrize("kind", ["json", "saved", "folder"])
def test_report_names_the_splits_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"pairs.{kind}"
    splits = {"train": rows(0, 1), "test": rows(2), "validation" if kind == "folder" else "eval": rows(3)}
    if kind == "json":
        path.write_text(json.dumps(splits))
    elif kind == "saved":
        datasets.DatasetDict({name: datasets.Dataset.from_list(each) for name, each in splits.items()}).save_to_disk(
            path
        )
    else:
        for name, each in splits.items():
            write(path / f"{name}.jsonl", *(int(row["prompt"][1:]) for row in each))
    *_, last = splits
    report, test_report = DataReport(), DataReport()
    assert len(list(RowSource(str(path)).read(report))) == 2
    assert len(list(RowSource(str(path), split="test").read(test_report))) == 1
    assert (set(report.unread_splits), set(test_report.unread_splits)) == ({"test", last}, {"train", last})


@pytest.mark.parametrize("content", [{"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}, {"train": rows(0), "n": 1}])
def test_json_of_other_form(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="or an object with such a list for each split"):
        places(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "folder"])
def test_split_names_of_a_column(tmp_path: Path, ending: str) -> None:
    """The column may be in a few rows only."""
    table = [row | {"split": split} for row, split in zip(rows(0, 1, 2), (None, "test", "train"), strict=True)]
    path = tmp_path / f"pairs.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in [*table, *rows(3)]))
    elif ending == "folder":
        datasets.Dataset.from_list(table).save_to_disk(str(path))
    else:
        frame = datasets.Dataset.from_list(table)
        {"json": lambda p: frame.to_json(p, lines=False), "csv": frame.to_csv, "parquet": frame.to_parquet}[ending](
            path
        )
    assert split_names(open_location(path)) == {"test", "train"}
    assert split_names(open_location(path), "other") == set()


# Faults of rows, each named by its place


def faults(path: Path) -> tuple[list[str], list[str]]:
    bad: list[str] = []
    good = [row["prompt"] for _, row in read_rows(path, on_bad=lambda place, fault: bad.append(f"{place}: {fault}"))]
    return good, bad


LONG, DEEP = "9" * 5000, "[" * 1500 + "]" * 1500


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json_faults_of_rows(tmp_path: Path, ending: str) -> None:
    lines = [
        '{"prompt": "p0"}',
        '{"prompt": "p1", "prompt": "p2"}',
        f'{{"prompt": "p3", "n": {LONG}}}',
        '{"prompt": "p4", "meta": [{"a": 1, "a": 1}]}',
        '{"prompt": "p5", "n": -12}',
    ]
    path = tmp_path / f"pairs.{ending}"
    path.write_text("\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]")
    good, bad = faults(path)
    assert good == ["p0", "p5"]
    place = "line" if ending == "jsonl" else "row"
    assert [fault.removeprefix(f"pairs.{ending} {place} ") for fault in bad] == [
        "2: repeated column: the key 'prompt' occurs 2 times",
        "3: invalid JSON: found an integer with 5000 digits",
        "4: repeated column: the key 'a' occurs 2 times",
    ]
    with pytest.raises(DataError, match=rf"pairs\.{ending} {place} 2: repeated column"):
        list(read_rows(path))


def test_json_nested_deep(tmp_path: Path) -> None:
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(f'{{"prompt": "p0"}}\n{{"prompt": {DEEP}}}\n{{"prompt": "p2"}}\n')
    good, bad = faults(lines)
    assert good == ["p0", "p2"]
    assert bad[0].startswith("pairs.jsonl line 2: invalid JSON: maximum recursion depth")
    whole = tmp_path / "pairs.json"
    whole.write_text(f'[{{"prompt": {DEEP}}}]')
    with pytest.raises(DataError, match=r"pairs\.json: found a value that is nested too deep.*as JSON lines"):
        faults(whole)
    whole.write_text('{"data": [], "data": []}')
    with pytest.raises(DataError, match=r"pairs\.json: repeated column: the key 'data' occurs 2 times"):
        faults(whole)


def texts(*cells: bytes) -> pa.Table:
    """Build a table of texts that may be no UTF-8, as writers without a check produce."""
    binary = pa.array(cells, pa.binary())
    return pa.table({"prompt": pa.Array.from_buffers(pa.string(), len(cells), binary.buffers())})


def test_parquet_text_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pq.write_table(texts(b"p0", b"\xff", b"p2", b"a\xc3"), path, row_group_size=3)
    expected = "pairs.parquet row {}: invalid UTF-8: {} at byte {} of a text"
    assert faults(path) == (
        ["p0", "p2"],
        [expected.format(2, "invalid start byte", 0), expected.format(4, "unexpected end of data", 1)],
    )


def test_saved_folder_text_is_not_utf8(tmp_path: Path) -> None:
    datasets.Dataset(texts(b"p0", b"\xff", b"\xff", b"p3")).save_to_disk(str(tmp_path / "saved"))
    good, bad = faults(tmp_path / "saved")
    assert good == ["p0", "p3"]
    assert [fault.split(":")[0] for fault in bad] == ["saved[train] row 2", "saved[train] row 3"]


def test_repeated_columns_of_tables(tmp_path: Path) -> None:
    comma = tmp_path / "pairs.csv"
    comma.write_text("prompt,chosen,chosen\na,b,c\n")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
    pq.write_table(table, tmp_path / "pairs.parquet")
    for path in (comma, tmp_path / "pairs.parquet"):
        with pytest.raises(DataError, match=r"found the columns \['chosen'\] more than once"):
            faults(path)
