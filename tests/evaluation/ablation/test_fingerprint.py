"""Tests of the fingerprints of cells."""

from __future__ import annotations

from pathlib import Path

import pytest

from lpc_lightning.evaluation import named_files
from lpc_lightning.evaluation.ablation import fingerprint as module
from lpc_lightning.evaluation.ablation.fingerprint import cell_fingerprint, code_version, digests_in_arguments


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
    return cell_fingerprint(arguments, weights, digests_in_arguments(arguments), code_version())


@pytest.mark.parametrize("file", ["fit.yaml", "groups/data.yaml", "pairs.jsonl", "model/weights"])
def test_fingerprint_changes_with_file(config: Path, file: str) -> None:
    before = compute()
    assert compute() == before
    path = config / file
    path.write_text(path.read_text() + "  ")
    assert compute() != before


@pytest.mark.parametrize(
    ("argument", "file"),
    [
        ("--data.path=parts/part-*.jsonl", "parts/part-0.jsonl"),
        ("--data.path=parts/**/*.jsonl", "parts/deep/pairs.jsonl"),
        ("--data=pattern.yaml", "parts/part-0.jsonl"),
        ("--data.path=~/pairs.jsonl", "pairs.jsonl"),
        ("--data.path=${LPC_TEST}/pairs.jsonl", "pairs.jsonl"),
        ("--data.path=saved", "saved/train/data-0.arrow"),
        ("--policy.adapter=adapter", "adapter/adapter_model.safetensors"),
        ("--policy.init_args.tokenizer=adapter", "adapter/tokenizer.json"),
        ("--model.reference_path=2024", "2024/weights"),
        ("--data.path={train: saved, test: 'parts/part-*.jsonl'}", "saved/train/data-0.arrow"),
        ("--data.path={train: saved, test: 'parts/part-*.jsonl'}", "parts/part-1.jsonl"),
        ("--data.parts={a: {path: pairs.jsonl}}", "pairs.jsonl"),
        ('--data.parts=[{"path": "pairs.jsonl"}]', "pairs.jsonl"),
        ("--callbacks.tasks=[task.yaml]", "task.yaml"),
        ("--data=own.yaml", "own.yaml"),
    ],
)
def test_fingerprint_changes_with_named_file(
    argument: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LPC_TEST", str(tmp_path))
    (tmp_path / "pattern.yaml").write_text("path: parts/part-*.jsonl")
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {"task.yaml": "filter: !function utils.last\n", "own.yaml": "name: own.yaml\n"}
    path.write_text(texts.get(file, "{}"))
    before = compute([argument])
    assert compute([argument]) == before
    path.write_text(path.read_text() + "# more")
    assert compute([argument]) != before


def test_fingerprint_of_text_that_is_no_path(config: Path) -> None:
    """Texts may be longer than names of files may be."""
    text = f"--data.columns.system={'x' * 300}"
    assert compute([text]) == compute([text])


def test_fingerprint_changes_with_arguments(config: Path) -> None:
    assert len({compute(), compute([*ARGUMENTS, "--seed_everything=1"]), compute(weights="best")}) == 3


@pytest.mark.parametrize("large", [False, True])
def test_fingerprint_is_that_of_moved_files(large: bool, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(named_files, "LARGE_FILE_BYTES", 0)
    before = compute()
    moved = config.rename(config.with_name(f"moved-{large}"))
    monkeypatch.chdir(moved)
    assert large or str(moved / "pairs.jsonl") in digests_in_arguments(ARGUMENTS)
    assert compute() == before


def test_fingerprint_ignores_output_files(config: Path) -> None:
    arguments = ["--trainer.default_root_dir=model", "--data.cache_dir=model", "--trainer.logger.project=model"]
    arguments += ["--trainer={logger: {init_args: {name: model}}, callbacks: [{init_args: {dirpath: model}}]}"]
    before = compute(arguments)
    (config / "model" / "weights").write_text("other")
    assert compute(arguments) == before


def test_code_version_covers_cell_not_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "lpc_lightning/deep/loss.py": "x = 1",
        "lpc_lightning/callbacks/__init__.py": "def f():\n    from lpc_lightning.evaluation.near import x",
        "lpc_lightning/evaluation/near.py": "from lpc_lightning.evaluation.far import y",
        "lpc_lightning/evaluation/far.py": "y = 1",
        "lpc_lightning/evaluation/ablation/cells/cell_run.py": "from lpc_lightning.evaluation.ablation import results",
        "lpc_lightning/evaluation/ablation/results.py": "import lpc_lightning.evaluation.records.files",
        "lpc_lightning/evaluation/records/files.py": "w = 1",
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
