"""Tests of the number of scored pairs that are training pairs, whose file may have changed or be another one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.cli import main
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.evaluation.accuracy.training_overlap import training_pairs
from lpc_lightning.evaluation.adaptation.command import adapt
from lpc_lightning.evaluation.comparison.command import evaluate
from lpc_lightning.inference.checkpoints import checkpoint_origin, read_checkpoint
from lpc_lightning.inference.export import export
from lpc_lightning.inference.run_data import data_of_run, read_rows
from tests.fixtures.commands import LATENT, MODEL, POLICY, TRAINER, checkpoint_of

FIT = [*POLICY, *MODEL, *LATENT, *TRAINER, "--data=PreferenceData", "--data.batch_size=4", "--trainer.max_epochs=1"]
CHANGED = "The training data pairs.jsonl has changed, or is another one"


def write_pairs(folder: Path, numbers: range, name: str = "pairs.jsonl") -> Path:
    """Write pairs that are the same in every file with their number."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    rows = [{"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no", "annotator": ["A", "B"][n % 2]} for n in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a file of 20 pairs, a run on it by its relative path, and its export. The folder has been moved."""
    folder = tmp_path_factory.mktemp("home") / "project"
    write_pairs(folder, range(20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.chdir(folder)
        main(["fit", *FIT, "--data.path=pairs.jsonl", f"--data.cache_dir={folder / 'cache'}"])
        export(str(checkpoint_of(Path("runs/version_0"))), "exported")
    return folder.rename(folder.with_name("moved"))


def origin_of(project: Path) -> dict[str, Any]:
    path = checkpoint_of(project / "runs" / "version_0")
    return checkpoint_origin(read_checkpoint(path, weights=False), path)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Folder with another file of the same name, and the scored pairs: eight of the training file and eight others."""
    write_pairs(tmp_path, range(12, 28), "scored.jsonl")
    write_pairs(tmp_path / "else", range(30, 50))
    return tmp_path / "else"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "export"])
@pytest.mark.parametrize("is_right", [True, False], ids=["right file", "other file"])
def test_evaluate_counts_the_file_of_the_fit(
    project: Path,
    elsewhere: Path,
    kind: str,
    is_right: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = project / "exported" if kind == "export" else checkpoint_of(project / "runs" / "version_0")
    expected = len(training_numbers(project, monkeypatch) & set(range(12, 28)))
    assert expected > 0
    monkeypatch.chdir(project if is_right else elsewhere)
    output = elsewhere.parent / "results"
    capsys.readouterr()
    evaluate(
        [str(model)], tasks=["none"], preferences=[str(elsewhere.parent / "scored.jsonl")], output=str(output),
        device="cpu",
    )  # fmt: skip
    (results,) = output.glob("*/results.json")
    record = json.loads(results.read_text())["tasks"]["preferences"]
    out = capsys.readouterr().out
    assert record.get("trained_on") == (expected if is_right else None)
    assert (CHANGED in out) != is_right
    assert ("training pairs of this run" in out) == is_right


def training_numbers(project: Path, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return the numbers of the pairs that the run has trained on."""
    monkeypatch.chdir(project)
    source = data_of_run(origin_of(project)).source("train")
    assert source is not None
    return {int(example.prompt[0]["content"][4:-1]) for example in source.read(DataReport())}


@pytest.mark.slow
def test_adapt_counts_the_file_of_the_fit(
    project: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(elsewhere)
    model, scored = str(checkpoint_of(project / "runs" / "version_0")), str(elsewhere.parent / "scored.jsonl")
    adapt([model], scored, shots=[0, 2], rounds=1, output="adapted", device="cpu")
    assert CHANGED in capsys.readouterr().out
    assert "training pairs of this run" not in (elsewhere / "adapted" / "adaptation.md").read_text()


def data_settings(name: str, **settings: Any) -> dict[str, Any]:
    return {"class_path": f"lpc_lightning.data.{name}", "init_args": settings}


def recorded(data: dict[str, Any]) -> dict[str, Any]:
    """Return the origin of a run on this data in the working directory."""
    rows = {"train": read_rows(data_of_run({"data": data}), "train")}
    return {"data": data, "data_folder": str(Path.cwd()), "data_rows": rows}


def test_relative_path_is_that_of_the_fit(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file of the fit is found from another folder. When it is gone, that of the working directory is compared."""
    files = {"train": "pairs.jsonl", "validation": ["more/*.jsonl"]}
    monkeypatch.chdir(write_pairs(elsewhere.parent / "fit", range(20)).parent)
    write_pairs(Path("more"), range(3))
    origin = recorded(data_settings("PreferenceData", path=files))
    expected = training_pairs(origin)
    assert expected is not None
    monkeypatch.chdir(elsewhere)
    assert training_pairs(origin) == expected
    assert training_pairs({"training": origin}) == expected
    assert not capsys.readouterr().out
    (elsewhere.parent / "fit").rename(elsewhere.parent / "moved")
    assert training_pairs(origin) is None
    assert capsys.readouterr().out.startswith(f"{CHANGED}: found 20 other pairs, expected the 20 pairs of the fit.")
    monkeypatch.chdir(elsewhere.parent / "moved")
    assert training_pairs(origin) == expected


@pytest.mark.parametrize("change", ["label", "fewer", "order"])
def test_changed_training_file(tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_pairs(tmp_path, range(20))
    origin = recorded(data_settings("PreferenceData", path=str(path), validation_share=0.0))
    lines = path.read_text().splitlines(keepends=True)
    if change == "label":
        lines[3] = lines[3].replace("yes", "maybe")
    elif change == "fewer":
        lines.pop()
    else:
        lines.reverse()
    path.write_text("".join(lines))
    assert (training_pairs(origin) is None) == (change != "order")
    found = {"label": "found 20 other pairs", "fewer": "found 19 pairs", "order": ""}[change]
    assert found in capsys.readouterr().out


@pytest.mark.parametrize(
    "data",
    [
        None,
        data_settings("PreferenceData", path="gone.jsonl"),
        data_settings("PreferenceData", path="someone/pairs"),
        data_settings("PreferenceData", path="${UNSET_FOLDER}/pairs.jsonl"),
        data_settings("PreferenceData", unknown=3),
        {"class_path": "antigravity.Pairs"},
        data_settings("PreferenceMixture", sources=[{"class_path": "this.It"}]),
    ],
    ids=str,
)
def test_training_pairs_are_unknown(data: dict[str, Any] | None, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNSET_FOLDER", raising=False)
    assert training_pairs({"data": data, "data_rows": {"train": {"rows": 3, "digest": "0" * 64}}}) is None
    assert not {"antigravity", "this"} & set(sys.modules)


@pytest.mark.parametrize("rows", [None, {}, [], {"train": None}, {"train": 3}], ids=str)
def test_training_pairs_without_a_record(rows: Any) -> None:
    data = data_settings("SyntheticPreferences", train_pairs=5)
    assert training_pairs({"data": data, "data_rows": rows}) is None


KINDS: dict[str, tuple[Callable[[str], dict[str, Any]], int]] = {
    "PreferenceData": (lambda path: {"path": path, "validation_share": 0.0}, 20),
    "PreferenceMixture": (
        lambda path: {
            "sources": [
                {"name": name, "path": path.replace("pairs.jsonl", f"{name}.jsonl"), "validation_share": 0.0}
                for name in ("pairs", "other")
            ]
        },
        27,
    ),
    "SyntheticPreferences": (lambda path: {"train_pairs": 5}, 5),
}


@pytest.mark.parametrize("name", KINDS)
def test_training_pairs_of_each_kind_of_data(name: str, tmp_path: Path) -> None:
    path = write_pairs(tmp_path, range(20))
    write_pairs(tmp_path, range(20, 27), "other.jsonl")
    settings, number = KINDS[name]
    found = training_pairs(recorded(data_settings(name, **settings(str(path)))))
    assert found is not None
    assert len(found) == number
