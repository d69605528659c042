"""`lpc-lightning prepare --pairs`: the file holds the built-in pairs, in a form that `PreferenceData` reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lpc_lightning.cli import main
from lpc_lightning.cli.prepare import prepare
from lpc_lightning.data import PreferenceData
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.errors import ConfigError


@pytest.mark.parametrize("deciding", ["visible", "hidden"])
def test_sample_reads_back_as_generated(deciding: str, tmp_path: Path) -> None:
    file = tmp_path / "new" / "pairs.jsonl"
    main(["prepare", "--pairs", str(file), "--count", "30", "--deciding", deciding])
    data = PreferenceData(str(file), validation_share=0.0)
    for split, count in (("train", 24), ("test", 6)):
        source = data.source(split)
        assert source is not None
        found = list(source.read(DataReport()))
        expected = PreferenceGenerator(deciding=deciding).examples(count, split)
        for name in ("id", "prompt", "chosen", "rejected", "source", "factor", "annotator"):
            assert [getattr(each, name) for each in found] == [getattr(each, name) for each in expected], name


def test_sample_is_one_object_a_line(tmp_path: Path) -> None:
    file = prepare(pairs=str(tmp_path / "pairs.jsonl"))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 200
    assert {len(row) for row in rows} == {8}
    assert not (tmp_path / "models").exists()


def test_sample_bad_settings(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    with pytest.raises(ConfigError, match=r"count: found 0, expected at least 1"):
        prepare(pairs=str(file), count=0)
    with pytest.raises(ConfigError, match=r"pairs: found .*pairs\.csv, expected a file name that ends in \.jsonl"):
        prepare(pairs=str(file.with_suffix(".csv")))
    file.write_text("mine")
    with pytest.raises(ConfigError, match=r"pairs: found an existing file .*pairs\.jsonl, expected a new one"):
        prepare(pairs=str(file))
    assert file.read_text() == "mine"
