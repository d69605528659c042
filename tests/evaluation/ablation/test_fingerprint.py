"""Tests of the fingerprints of cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpc_lightning.evaluation.ablation import fingerprint as module
from lpc_lightning.evaluation.ablation.fingerprint import code_version, fingerprint


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a config that names a group file. The group file names a data file. There is also a model folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "groups").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    (tmp_path / "pairs.jsonl").write_text("{}")
    (tmp_path / "groups" / "data.yaml").write_text("init_args: {path: pairs.jsonl, cache_dir: model}")
    (tmp_path / "fit.yaml").write_text("data: groups/data.yaml")
    return tmp_path


ARGUMENTS = ["--config=fit.yaml", "--policy.path=model", "--model.beta=0.1"]


def compute(arguments: list[str] = ARGUMENTS, weights: str = "last") -> str:
    module._describe_file.cache_clear()
    return fingerprint(arguments, weights)


@pytest.mark.parametrize("file", ["fit.yaml", "groups/data.yaml", "pairs.jsonl", "model/weights"])
def test_fingerprint_changes_with_file(config: Path, file: str) -> None:
    before = compute()
    assert compute() == before
    path = config / file
    path.write_text(path.read_text() + "  ")
    assert compute() != before


def test_fingerprint_changes_with_arguments(config: Path) -> None:
    assert len({compute(), compute([*ARGUMENTS, "--seed_everything=1"]), compute(weights="best")}) == 3


def test_fingerprint_ignores_output_files(config: Path) -> None:
    arguments = ["--trainer.default_root_dir=model", "--data.cache_dir=model"]
    before = compute(arguments)
    (config / "model" / "weights").write_text("other")
    assert compute(arguments) == before


def test_code_version_covers_fit_not_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "lpc_lightning/deep/loss.py": "x = 1",
        "lpc_lightning/callbacks/__init__.py": "def f():\n    from lpc_lightning.evaluation.near import x",
        "lpc_lightning/evaluation/near.py": "from lpc_lightning.evaluation.far import y",
        "lpc_lightning/evaluation/far.py": "y = 1",
        "lpc_lightning/evaluation/report/command.py": "z = 1",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_package", lambda name: tmp_path / name)

    def version() -> str:
        code_version.cache_clear()
        return code_version()

    before = version()
    for name in files:
        (tmp_path / name).write_text(files[name] + "\n# a comment")
        assert (version() != before) == (name != "lpc_lightning/evaluation/report/command.py"), name
        (tmp_path / name).write_text(files[name])
    monkeypatch.undo()
    code_version.cache_clear()
