"""Tests of files that are complete or absent, and of reading files that are neither."""

from __future__ import annotations

import ast
import json
import os
import resource
import warnings
from pathlib import Path

import pytest

from lpc_lightning.errors import DamagedFileError
from lpc_lightning.files.json_files import read_if_whole, read_json_object, write_json, write_pieces, write_text

ROOT = Path(__file__).parents[2]
WRITERS = [
    *sorted((ROOT / "callbacks").glob("*.py")),
    *sorted((ROOT / "evaluation").rglob("*.py")),
    ROOT / "lpc_lightning" / "inference" / "alpaca.py",
]
"""Modules whose files are read again by other commands, or that write them during a run that may be killed."""


def test_write_text_on_full_disk_keeps_earlier_file(tmp_path: Path) -> None:
    """A limit on the file size stops the write in the middle with an OSError, like a full disk."""
    path = tmp_path / "a.json"
    write_text(path, "earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_text(path, "x" * (1 << 21))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_write_pieces_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename comes after the content is on the disk: a loss of power must not leave an empty file."""
    path, fsync = tmp_path / "a.txt", os.fsync
    path.write_text("earlier")
    contents = []

    def waited(number: int) -> None:
        fsync(number)
        contents.append({file.read_text() for file in tmp_path.iterdir()})

    monkeypatch.setattr(os, "fsync", waited)
    write_pieces(path, (f"{number}\n" for number in range(3)))
    assert contents == [{"earlier", "0\n1\n2\n"}]
    assert path.read_text() == "0\n1\n2\n"


def test_write_json_replaces_a_file_whole(tmp_path: Path) -> None:
    path, other = tmp_path / "a.json", tmp_path / "other"
    write_json(path, {"value": 1})
    other.hardlink_to(path)
    value = {"text": "ä \ud800", "list": [1.5, None]}
    write_json(path, value)
    assert read_json_object(path) == json.loads(json.dumps(value)) == value
    assert json.loads(other.read_text()) == {"value": 1}


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"[1]", b"3", b'{"a": "\xff"}', b"[" * 100_000])
def test_read_damaged_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"a\.json: found .*, expected a JSON object\."):
        read_json_object(path)
    with pytest.warns(UserWarning, match=r"a\.json: found .*, expected a JSON object\. It is left out\."):
        assert read_if_whole(path, "It is left out.") == {}


def test_read_missing_file_does_not_warn(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        assert read_if_whole(tmp_path / "a.json", "It is left out.") == {}


def test_files_of_a_run_are_renamed_into_place() -> None:
    calls = [
        (f"{module}:{node.lineno}", node.func.attr, [ast.unparse(each) for each in node.args])
        for module in WRITERS
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert not [
        place
        for place, name, arguments in calls
        if name in ("write_text", "write_bytes")
        or (name == "open" and arguments[:1] in (["'w'"], ["'wb'"]))
        or (name in ("savefig", "print_png") and arguments[0] not in ("file", "buffer"))
    ]
