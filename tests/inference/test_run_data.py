"""Tests of the data that is made from the settings of a run, which may come from someone else."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.run_data import data_of_run

FOREIGN = "foreign_pairs.Pairs"
SETTINGS: dict[str, Any] = {
    "class": {"class_path": FOREIGN},
    "name": FOREIGN,
    "columns": {
        "class_path": "lpc_lightning.data.PreferenceData",
        "init_args": {"path": "pairs.jsonl", "columns": {"class_path": FOREIGN}},
    },
    "name of columns": {
        "class_path": "lpc_lightning.data.PreferenceData",
        "init_args": {"path": "pairs.jsonl", "columns": FOREIGN},
    },
    "mixture": {"class_path": "lpc_lightning.data.PreferenceMixture", "init_args": {"sources": [FOREIGN]}},
    "file": "settings.yaml",
    "file of columns": {
        "class_path": "lpc_lightning.data.PreferenceMixture",
        "init_args": {"sources": [{"path": "pairs.jsonl", "columns": "settings.yaml"}]},
    },
}
"""Settings that name a class of another module, in each form that the parser reads."""


@pytest.fixture(autouse=True)
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module on the path that no one has imported."""
    (tmp_path / "foreign_pairs.py").write_text(
        "from lpc_lightning import SyntheticPreferences\n\n\nclass Pairs(SyntheticPreferences):\n    pass\n"
    )
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({"class_path": FOREIGN}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_pairs", raising=False)


@pytest.mark.parametrize("name", SETTINGS)
def test_data_of_run_imports_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=r"found data settings that cannot be used .*foreign_pairs has not been impo"):
        data_of_run({"data": SETTINGS[name]})
    assert "foreign_pairs" not in sys.modules


def test_data_of_run_with_imported_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("foreign_pairs")
    monkeypatch.setitem(sys.modules, "foreign_pairs", module)  # forgotten after the test
    settings = {"class_path": FOREIGN, "init_args": {"train_pairs": 3}}
    assert type(data_of_run({"data": settings})) is module.Pairs


def test_texts_of_template_arguments_stay_texts() -> None:
    texts = ["Role: critic", "off", "2024", "1.0", "null", "[a]", "{a: 1}", "'12'"]
    arguments: dict[str, Any] = {text: text for text in texts}
    arguments |= {"nested": dict(arguments), "list": [*texts, [*texts]], "values": [False, None, 2024, 1.5]}
    settings = {"class_path": "lpc_lightning.data.SyntheticPreferences", "init_args": {"template_kwargs": arguments}}
    assert data_of_run({"data": settings}).template_settings.arguments == arguments
