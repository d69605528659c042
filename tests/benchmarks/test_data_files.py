"""Which files are measured, and the error for one that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data_files import NAMES, find_files
from benchmarks.run import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One known file, and others."""
    for name in ("polite_vs_impolite_1100.jsonl", "mine.jsonl.gz", "mine.csv", "other.parquet"):
        (tmp_path / name).touch()
    return tmp_path


def test_known_names_are_files_others_are_paths(folder: Path) -> None:
    found = find_files([str(folder / "other.parquet"), "polite", str(folder / "mine.jsonl.gz")], folder)
    assert list(found.items()) == [
        ("other", folder / "other.parquet"),
        ("polite", folder / NAMES["polite"]),
        ("mine", folder / "mine.jsonl.gz"),
    ]


@pytest.mark.parametrize(
    ("given", "path"),
    [([], "nowhere/hh_helpful_harmless.jsonl"), (["--data", "gone.csv"], "gone.csv")],
    ids=["a clone without the data", "a path"],
)
def test_missing_files_are_refused_first(
    given: list[str], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["run.py", "--data-dir", "nowhere", *given])
    with pytest.raises(SystemExit) as message:
        main()
    assert str(message.value) == (
        f"--data: found no file {path}, expected one of preference pairs: give the path of your own (--data "
        "my_pairs.jsonl), or the folder of hh, ultrafeedback, polite by --data-dir."
    )
    assert list(tmp_path.iterdir()) == []


def test_two_files_of_one_name_would_share_a_folder(folder: Path) -> None:
    with pytest.raises(SystemExit, match=r"mine\.jsonl\.gz and .*mine\.csv, both called mine, expected"):
        find_files([str(folder / "mine.jsonl.gz"), str(folder / "mine.csv")], folder)
