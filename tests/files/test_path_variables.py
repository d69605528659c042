"""Environment variables in paths, and in the settings that take paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpc_lightning.callbacks import LMEvaluation
from lpc_lightning.data import DataError, PreferenceData
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.accuracy.scored_pairs import PairsFile
from lpc_lightning.evaluation.comparison.command import evaluate
from lpc_lightning.files.path_variables import expand_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data that the variable DATA names."""
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("path", ["pairs.jsonl", "org/name", "~/pairs.jsonl", "/data/100 $/pairs.jsonl"])
def test_path_without_variables_is_unchanged(path: str) -> None:
    assert expand_path(path, "data.path") == path


@pytest.mark.parametrize("path", ["${DATA}/pairs.jsonl", "$DATA/pairs.jsonl", "${DATA}"])
def test_path_with_a_variable_is_expanded(path: str, folder: Path) -> None:
    expected = folder if path == "${DATA}" else folder / "pairs.jsonl"
    assert expand_path(path, "data.path") == str(expected)


@pytest.mark.parametrize("value", [None, ""])
def test_path_variable_not_set(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA", raising=False)
    if value is not None:
        monkeypatch.setenv("DATA", value)
    with pytest.raises(ConfigError) as error:
        expand_path("${DATA}/preferences/pairs.jsonl", "data.path")
    text = str(error.value)
    assert text.startswith("data.path: found ${DATA}/preferences/pairs.jsonl, but DATA is not set. Set DATA to the")
    assert "folder that holds preferences/pairs.jsonl, or set data.path to another file or a hub name" in text
    assert "`lpc-lightning prepare --pairs pairs.jsonl`" in text


def test_path_missing_file(folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"which is {folder}/other\.jsonl, and no such file or folder exists"):
        expand_path("$DATA/other.jsonl", "preferences")


@pytest.mark.parametrize("pattern", ["*.jsonl", "pairs.json?", "**/[op]*.jsonl"])
def test_path_pattern_with_a_variable(pattern: str, folder: Path) -> None:
    """The files of a pattern are those that a shell would find."""
    path = f"${{DATA}}/{pattern}"
    for setting in (path, [path], {"train": path}):
        (example,) = PreferenceData(setting, validation_share=0.0).source("train").read(DataReport())
        assert (example.id, example.chosen) == ("pairs.jsonl line 1", "So.")
    assert [each.id for each in PairsFile(path).source("test").read(DataReport())] == ["pairs.jsonl line 1"]


def test_path_pattern_that_no_file_matches(folder: Path) -> None:
    message = rf"There is no file that matches the pattern {folder}/\*\.csv \(looked at .*\)\. Correct the path\."
    data = PreferenceData("$DATA/*.csv")
    with pytest.raises(DataError, match=message):
        data.source("train")
    with pytest.raises(DataError, match=message):
        PairsFile("$DATA/*.csv")


def test_path_settings_are_expanded(folder: Path) -> None:
    assert PreferenceData("${DATA}/pairs.jsonl").path == f"{folder}/pairs.jsonl"
    assert PreferenceData({"train": "$DATA/pairs.jsonl"}).path == {"train": f"{folder}/pairs.jsonl"}
    assert PairsFile("$DATA/pairs.jsonl").content == PairsFile(f"{folder}/pairs.jsonl").content
    assert LMEvaluation(data_dir="$DATA").data_dir == str(folder)


def test_path_settings_are_named_in_errors() -> None:
    missing = "${NO_SUCH_VARIABLE}/x"
    with pytest.raises(ConfigError, match=r"^data\.path: found"):
        PreferenceData(missing)
    with pytest.raises(ConfigError, match=r"^data\.path\.train: found"):
        PreferenceData({"train": missing})
    with pytest.raises(ConfigError, match=r"^preferences: found"):
        PairsFile(missing)
    with pytest.raises(ConfigError, match=r"^LMEvaluation\.data_dir: found"):
        LMEvaluation(data_dir=missing)
    with pytest.raises(ConfigError, match=r"^data_dir: found"):
        evaluate(["a"], data_dir=missing)
