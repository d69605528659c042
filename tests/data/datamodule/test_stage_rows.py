"""Tests of the rows of each stage: files, split columns, and files and folders with splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from lpc_lightning.data import MixtureSource, PreferenceData
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.rows import DataError
from lpc_lightning.errors import ConfigError
from tests.data.datamodule.conftest import ids, prompts, row


def test_split_column_selects_rows(data: Any, write_rows: Any) -> None:
    places = {0: {}, 1: {"split": "train"}, 2: {"split": "test"}, 3: {"split": "held"}, 4: {"split": "test"}}
    path = write_rows([row(n, **column) for n, column in places.items()])
    module = data(path, validation_split="held")
    assert ids(module, "train") == ["pairs.jsonl line 1", "pairs.jsonl line 2"]
    assert ids(module, "validation") == ["pairs.jsonl line 4"]
    assert ids(module, "test") == ["pairs.jsonl line 3", "pairs.jsonl line 5"]
    assert module.reports["train"].other_splits == {"test": 2, "held": 1}


@pytest.mark.parametrize("stage", ["train", "validation"])
def test_split_column_that_no_row_has(stage: Any, data: Any, write_rows: Any) -> None:
    path = write_rows([row(number, part=part) for number, part in enumerate(["train", "test", "dev"])])
    with pytest.raises(DataError, match=r"data\.split_column: found 'prat', in which no row has a value"):
        ids(data(path, split_column="prat"), stage)
    with pytest.raises(DataError, match=r"data\.split_column: found 'prat'"):
        ids(data({"train": path, "test": path}, split_column="prat"), "train")
    assert [len(ids(data(path, split_column="part"), each)) for each in ("train", "test", "validation")] == [1, 1, 1]
    unmarked = write_rows([row(number) for number in range(3)], "unmarked.jsonl")
    both = data({"train": path, "test": unmarked}, split_column="part")
    assert [len(ids(both, each)) for each in ("train", "test")] == [1, 3]


def test_path_one_file_for_each_stage(data: Any, write_rows: Any) -> None:
    files = {name: write_rows([row(n)], f"{name}.jsonl") for n, name in enumerate(("train", "validation", "test"))}
    module = data(files)
    for stage in files:
        assert ids(module, stage) == [f"{stage}.jsonl line 1"]


def test_path_as_a_path_object(write_rows: Any) -> None:
    """In Python, a `pathlib.Path` stands for its text, also in a list or a mapping."""
    one, other = (write_rows([row(n)], f"{n}.jsonl") for n in range(2))
    forms: list[tuple[Any, Any]] = [(one, str(one)), ([one, other], [str(one), str(other)])]
    forms += [({"train": path}, {"train": text}) for path, text in forms]
    for path, text in forms:
        assert PreferenceData(path).path == PreferenceData(text).path
        assert MixtureSource(path=path).path == MixtureSource(path=text).path
    assert MixtureSource(path=one).name == "0"


def test_path_that_is_a_data_set() -> None:
    """TRL takes it. The error says how to save it."""
    rows = Dataset.from_list([row(0)])
    with pytest.raises(ConfigError, match=r"^data\.path: found a Dataset, expected a path, .*`dataset\.save_to_disk"):
        PreferenceData(rows)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^data\.sources\.path\.train: found a Dataset, expected a path"):
        MixtureSource(path=DatasetDict(train=rows))


@pytest.mark.parametrize("form", ["folder", "saved", "json", "column"])
def test_path_with_splits_for_each_stage(form: str, data: Any, write_rows: Any, tmp_path: Path) -> None:
    """Each stage has a path with the splits of all stages, and the test stage also one with a split alone."""

    def path_of(name: str, numbers: dict[str, int]) -> Path:
        rows = {split: [row(number)] for split, number in numbers.items()}
        if form == "column":
            return write_rows([row(number, split=split) for split, number in numbers.items()], f"{name}.jsonl")
        if form == "json":
            (tmp_path / f"{name}.json").write_text(json.dumps(rows))
            return tmp_path / f"{name}.json"
        folder = tmp_path / name
        if form == "saved":
            DatasetDict({split: Dataset.from_list(each) for split, each in rows.items()}).save_to_disk(folder)
            return folder
        folder.mkdir()
        for split, each in rows.items():
            write_rows(each, f"{name}/{split}.jsonl")
        return folder

    def numbers_of(paths: dict[str, Path], **settings: Any) -> dict[str, list[int]]:
        module = data(paths, **settings)
        texts = {stage: [pair.chosen for pair in module.source(stage).read(DataReport())] for stage in paths}
        return {stage: [int(text.strip("God.")) for text in each] for stage, each in texts.items()}

    stages = ("train", "validation", "test")
    paths = {
        stage: path_of(stage, {"train": 10 * n, "validation": 10 * n + 1, "test": 10 * n + 2})
        for n, stage in enumerate(stages)
    }
    assert numbers_of(paths) == {"train": [0], "validation": [11], "test": [22]}
    assert numbers_of(paths, validation_split="test") == {"train": [0], "validation": [12], "test": [22]}
    assert numbers_of(paths | {"test": path_of("one", {"validation": 9})})["test"] == [9]
    with pytest.raises(
        DataError, match=r"data\.test_split: found the splits train, validation, expected test, or a single"
    ):
        numbers_of(paths | {"test": path_of("two", {"train": 1, "validation": 2})})


@pytest.mark.parametrize(("stage", "other"), [("validation", "test"), ("test", "validation")])
def test_split_of_a_stage_without_a_path(stage: str, other: str, data: Any, write_rows: Any) -> None:
    path = write_rows([row(n, split=("train", "train", "dev2")[n % 3]) for n in range(6)])
    paths, settings = {"train": path, other: write_rows([row(9)], "other.jsonl")}, {f"{stage}_split": "dev2"}
    with pytest.raises(
        ValueError, match=rf"^data\.{stage}_split: found 'dev2' beside data\.path for train and {other} o"
    ):
        data(paths, **settings)
    with pytest.raises(ValueError, match=rf"^data\.sources\.{stage}_split: found 'dev2' beside data\.sources\.path"):
        MixtureSource(path={name: str(each) for name, each in paths.items()}, **settings)
    module = data({**paths, stage: path}, **settings)  # as the error says
    assert ids(module, stage) == ["pairs.jsonl line 3", "pairs.jsonl line 6"]
    assert ids(module, other) == ["other.jsonl line 1"]
    assert len(ids(module, "train")) == 4


@pytest.mark.parametrize("split", ["test", None])
def test_split_default_without_a_path(split: str | None, data: Any, write_rows: Any) -> None:
    module = data({"train": write_rows([row(0), row(1)])}, test_split=split, validation_share=0.0)
    assert (ids(module, "test"), len(ids(module, "train"))) == ([], 2)
    both = data({"train": write_rows([row(0)]), "test": write_rows([row(1)], "test.jsonl")}, test_split=split)
    assert ids(both, "test") == ["test.jsonl line 1"]


def test_path_of_train_with_a_few_test_rows(data: Any, write_rows: Any) -> None:
    """Rows without a value belong to training."""
    train = write_rows([row(0), row(1, split="test"), row(2, split="")], "some.jsonl")
    module = data({"train": train, "test": write_rows([row(3), row(4)], "test.jsonl")}, validation_share=0.0)
    assert ids(module, "train") == ["some.jsonl line 1", "some.jsonl line 3"]
    assert ids(module, "test") == ["test.jsonl line 1", "test.jsonl line 2"]
    assert module.reports["train"].other_splits == {"test": 1}


def test_path_saved_data_set_splits(data: Any, tmp_path: Path) -> None:
    """The data set has the splits and messages of `HuggingFaceH4/ultrafeedback_binarized`."""

    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    def conversation(number: int) -> dict[str, Any]:
        question, answers = message("user", f"Question {number}?"), (f"Good {number}.", f"Bad {number}.")
        chosen, rejected = ([question, message("assistant", answer)] for answer in answers)
        return {"prompt": question["content"], "chosen": chosen, "rejected": rejected, "score": 1.0}

    splits = {"train_prefs": range(6), "test_prefs": range(6, 8), "train_sft": range(8, 20)}
    saved = {name: Dataset.from_list([conversation(n) for n in numbers]) for name, numbers in splits.items()}
    DatasetDict(saved).save_to_disk(tmp_path / "ultra")
    module = data(tmp_path / "ultra", train_split="train_prefs", validation_split="test_prefs", test_split=None)
    assert ids(module, "train") == [f"ultra[train_prefs] row {n}" for n in range(1, 7)]
    assert ids(module, "validation") == ["ultra[test_prefs] row 1", "ultra[test_prefs] row 2"]
    assert module.source("test") is None
    assert "Question 6?" in prompts(module, "validation")[0]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_split_column_names_validation(name: str, data: Any, write_rows: Any) -> None:
    """The rows of a validation split are used, and no training prompt is held out."""
    splits = ["train"] * 6 + [name] * 2 + ["test"] * 2
    module = data(write_rows([row(n, split=split) for n, split in enumerate(splits)]))
    stages = {stage: ids(module, stage) for stage in ("train", "validation", "test")}
    lines = [f"pairs.jsonl line {n}" for n in range(1, 11)]
    assert stages == {"train": lines[:6], "validation": lines[6:8], "test": lines[8:]}
    assert module.reports["train"].other_splits == {name: 2, "test": 2}


@pytest.mark.parametrize("form", ["folder", "saved"])
@pytest.mark.parametrize("other", ["test", "val"])
def test_split_column_in_an_own_split(form: str, other: str, data: Any, tmp_path: Path) -> None:
    """`datasets` puts a file of any name, and `DatasetDict` its only data set, into the split `train`."""
    rows, folder = [row(number, split="train" if number else other) for number in range(3)], tmp_path / form
    if form == "folder":
        folder.mkdir()
        (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        assert len(ids(data(folder / "pairs.jsonl", validation_share=0.0), "train")) == 2
    else:
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder))
    with pytest.raises(
        DataError, match=rf"found '{other}' in the column 'split' of a row that belongs to the split 'tr"
    ):
        ids(data(folder, validation_share=0.0), "train")
    assert len(ids(data(folder, validation_share=0.0, split_column="none"), "train")) == 3


def test_split_in_a_few_rows(data: Any, write_rows: Any) -> None:
    module = data(write_rows([row(n) for n in range(5)] + [row(5, split="validation")]), validation_share=0.0)
    assert len(ids(module, "train")) == 5
    assert ids(module, "validation") == ["pairs.jsonl line 6"]


def test_path_json_with_splits(data: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps({"train": [row(n) for n in range(6)], "test": [row(6)], "dev": [row(7)]}, indent=1))
    module = data(path, validation_share=0.2)
    assert ids(module, "train") == [f"pairs.json[train] row {n}" for n in range(1, 7)]
    assert ids(module, "test") == ["pairs.json[test] row 1"]
    assert ids(module, "validation") == ["pairs.json[dev] row 1"]


def test_path_folder_of_shards(data: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001")):
        Dataset.from_list([row(10 * number + n) for n in range(9)]).to_parquet(folder / f"{name}.parquet")
    module = data(folder.parent)
    held = ids(module, "validation")
    assert sorted(held + ids(module, "train")) == [
        f"train-0000{k}-of-00002.parquet row {n}" for k in range(2) for n in range(1, 10)
    ]
    assert ids(module, "test") == [f"test-00000-of-00001.parquet row {n}" for n in range(1, 10)]


@pytest.mark.parametrize("form", ["folder", "saved", "json"])
def test_own_splits_without_a_test_split(form: str, data: Any, write_rows: Any, tmp_path: Path) -> None:
    """By default there is no test then. A split that a setting names is required."""
    path, rows = tmp_path / "set", {"train": [row(0), row(1)], "dev": [row(2)]}
    if form == "json":
        path = tmp_path / "set.json"
        path.write_text(json.dumps(rows))
    elif form == "saved":
        DatasetDict({split: Dataset.from_list(each) for split, each in rows.items()}).save_to_disk(path)
    else:
        path.mkdir()
        for split, each in rows.items():
            write_rows(each, f"set/{split}.jsonl")
    module = data(path)
    assert module.source("test") is None
    assert (len(ids(module, "train")), len(ids(module, "validation")), ids(module, "test")) == (2, 1, [])
    with pytest.raises(DataError, match=r"has no split 'tset'\. It has: train, \w+\. Set the split .*data\.test_split"):
        ids(data(path, test_split="tset"), "test")


def test_test_split_that_no_row_has(data: Any, write_rows: Any) -> None:
    path = write_rows([row(0), row(1, split="held")])
    with pytest.raises(
        DataError, match=r"^data\.test_split: found 'hold', expected a value of .*'split', which has held"
    ):
        data(path, test_split="hold").source("test")
    assert ids(data(path, test_split="held"), "test") == ["pairs.jsonl line 2"]
    assert ids(data(path, test_split="train"), "test") == ["pairs.jsonl line 1"]
    with pytest.raises(DataError, match=r"which has none\. Correct it, or set it to null"):
        data(write_rows([row(0)]), test_split="hold").source("test")


def test_path_list_of_files(write_rows: Any, tmp_path: Path) -> None:
    files = [str(write_rows([row(n)], f"{n}.jsonl")) for n in range(3)]
    module = PreferenceData(files, validation_share=0.0, cache_dir=str(tmp_path / "cache"))
    assert ids(module, "train") == [f"{n}.jsonl line 1" for n in range(3)]
