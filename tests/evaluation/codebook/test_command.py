"""Tests of the command `lpc-lightning explain`, and of the callback that does the same at the end of a fit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.cli import main as lpc_lightning
from lpc_lightning.data import Columns
from lpc_lightning.data.synthetic import PreferenceGenerator
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.codebook.command import explain, main
from lpc_lightning.evaluation.codebook.explanation import ExplanationPairs
from lpc_lightning.files.output_paths import claim_output_folder
from lpc_lightning.inference.generation import Condition, Decoding, answers
from lpc_lightning.inference.opening import open_policy, short_name
from lpc_lightning.inference.prompts import text_prompt
from tests.fixtures.commands import LATENT, MODEL, POLICY, TRAINER, assert_one_error, run_command

pytestmark = pytest.mark.slow

FIT = ["--model.beta=1", "--model.optimizer.lr=0.03", "--data.train_pairs=8", "--data.validation_pairs=6"]
FIT += ["--data.test_pairs=0", "--data.batch_size=4", "--trainer.max_steps=2"]
FIT += ["--callbacks+=lpc_lightning.callbacks.CodeExplanations", "--callbacks.examples=2"]
SPACES = {
    "codes": ["--latent=MarginalSpace", "--latent.num_codes=3", "--latent.init_logit_std=2"],
    "gaussian": ["--latent=GaussianSpace", "--latent.num_codes=3"],
    "plain": [],
}


@pytest.fixture(scope="module")
def runs(tiny_fit: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of folders of runs of two steps with the callback, by latent space."""
    root = tmp_path_factory.mktemp("runs")
    return {name: shutil.copytree(tiny_fit(*FIT, *space), root / name / "version_0") for name, space in SPACES.items()}


def checkpoint(run: Path) -> str:
    (path,) = (run / "checkpoints").glob("*.ckpt")
    return str(path)


def test_explain_equals_the_end_of_the_fit(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["codes"]
    at_the_end = json.loads((run / "codes.json").read_text())
    assert at_the_end["pairs"] == 6
    assert at_the_end["answered"] is None
    capsys.readouterr()

    main(["explain", checkpoint(run), "--examples=2", "--max_new_tokens=3", "--device=cpu"])
    out = capsys.readouterr().out
    written = json.loads((run / "codes.json").read_text())
    assert (run / "codes.md").read_text() in out
    for code, before in zip(written["codes"], at_the_end["codes"], strict=True):
        for part in ("likeliest", "label", "raised", "lowered", "prompts", "decided"):
            assert code[part] == approximately(before[part]), part
    texts = {each["prompt"] for code in written["codes"] for each in code["prompts"]}
    assert texts <= {pair.prompt[-1]["content"] for pair in PreferenceGenerator().examples(6, "validation")}


def approximately(value: Any) -> Any:
    """Allow rounding in all numbers of a JSON value."""
    if isinstance(value, float):
        return pytest.approx(value, abs=1e-4)
    if isinstance(value, list):
        return [approximately(each) for each in value]
    return {name: approximately(each) for name, each in value.items()} if isinstance(value, dict) else value


def test_explain_keeps_other_commands_out(runs: dict[str, Path], tmp_path: Path) -> None:
    model = checkpoint(runs["codes"])
    with (
        claim_output_folder(tmp_path / short_name(model), "output"),
        pytest.raises(ConfigError, match=r"output: another command writes to .*version_0"),
    ):
        explain([model], output=str(tmp_path), device="cpu")


@pytest.fixture
def cells(runs: dict[str, Path], tmp_path: Path) -> list[str]:
    """Two checkpoints whose runs have the same name, as in an ablation. Their codes are not explained."""
    ignored = shutil.ignore_patterns("codes.*")
    folders = [shutil.copytree(runs["codes"], tmp_path / "cells" / name / "run", ignore=ignored) for name in "AB"]
    return [str(Path(checkpoint(folder)).rename(folder / "checkpoints" / "last.ckpt")) for folder in folders]


FAST: dict[str, Any] = {"max_new_tokens": 0, "examples": 1, "device": "cpu"}


def explained(folder: Path) -> dict[str, str]:
    """Return the checkpoint in each `codes.json`, by the name of its folder."""
    return {path.parent.name: json.loads(path.read_text())["checkpoint"] for path in folder.glob("*/codes.json")}


def test_explain_gives_each_checkpoint_a_folder(cells: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    expected = {"run-last": cells[0], "run-last-2": cells[1]}
    for _ in range(2):  # a second time, the same files are replaced
        explain(cells, output=str(out), **FAST)
        assert explained(out) == expected
    with pytest.raises(ConfigError, match=rf"output: .*run-last/codes\.json explains {cells[0]}, expected no"):
        explain(cells[1:], output=str(out), **FAST)
    assert explained(out) == expected


@pytest.mark.parametrize(("batch_size", "expected"), [(None, [3, 3]), (6, [6]), (2, [2, 2, 2])])
def test_explain_batches_of_the_run(
    runs: dict[str, Path], batch_size: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six validation pairs of a run with batches of four, which are of equal size."""
    sizes = []
    update = ExplanationPairs.update

    def counted(self: ExplanationPairs, evaluated: Any, batch: Any, space: Any) -> None:
        sizes.append(batch.pairs)
        update(self, evaluated, batch, space)

    monkeypatch.setattr(ExplanationPairs, "update", counted)
    explain([checkpoint(runs["codes"])], batch_size=batch_size, **FAST)
    assert sizes == expected


def test_explain_refuses_equal_folders(cells: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    last = Path(cells[0])
    best, run = last.with_name("best.ckpt"), last.parents[1]
    shutil.copy(last, best)
    with pytest.raises(ConfigError, match=rf"output: found {best} and {last}, whose files would both go to {run}, "):
        explain([str(best), str(last)], **FAST)
    assert not (run / "codes.json").exists()
    explain([str(best)], **FAST)
    with pytest.raises(ConfigError, match=rf"output: .*codes\.json explains {best}, expected no"):
        explain([str(last)], **FAST)
    moved = run.rename(run.with_name("moved"))
    monkeypatch.chdir(moved)
    explain(["checkpoints/best.ckpt"], **FAST)
    assert json.loads((moved / "codes.json").read_text())["checkpoint"] == str(moved / "checkpoints" / "best.ckpt")


def test_explain_a_file_with_answers(runs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = PreferenceGenerator("hidden", annotators=3).examples(5, "test")
    rows = [
        {
            "id": "same",
            "prompt": list(pair.prompt),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "annotator": f"{n}",
        }
        for n, pair in enumerate(pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = checkpoint(runs["codes"])
    options = {"prompt": "How?", "codes": [2], "max_new_tokens": 4, "limit": 4, "device": "cpu"}
    explain([model], str(path), output=str(tmp_path / "out"), whole_vocabulary=True, **options)
    (written,) = (tmp_path / "out").glob("*/codes.json")
    content = json.loads(written.read_text())
    assert content["pairs"] == 4
    assert content["preferences"] == str(path)
    for each in content["codes"][0]["decided"]:
        pair = pairs[int(each["pair"][1])]
        assert (each["chosen"], each["rejected"]) == (pair.chosen, pair.rejected)

    opened = open_policy(model, device="cpu")
    expected = next(answers(opened, [text_prompt("How?")], [Condition("prior"), Condition("code 2", 2)], Decoding(4)))
    assert [each["text"] for each in content["answered"]["answers"]] == [each.text for each in expected.answers]
    assert "## One prompt under each code: How?" in written.with_suffix(".md").read_text()


FROM_FILE = ["fit", *POLICY, *MODEL, *LATENT, *TRAINER, "--data=PreferenceData", "--data.path=pairs.jsonl"]
FROM_FILE += ["--data.batch_size=4", "--callbacks+=lpc_lightning.callbacks.CodeExplanations"]


def write_pairs(folder: Path, numbers: range) -> Path:
    folder.mkdir()
    rows = ({"prompt": f"Say {n}.", "chosen": "yes", "rejected": "no"} for n in numbers)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_explain_refuses_pairs_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fit with a relative path, and another folder that has another file of that name."""
    elsewhere, project = write_pairs(tmp_path / "else", range(30, 90)), write_pairs(tmp_path / "project", range(40))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.chdir(project)
    lpc_lightning(FROM_FILE)
    run = project / "runs" / "version_0"
    at_the_end = {name: (run / name).read_bytes() for name in ("codes.md", "codes.json")}
    monkeypatch.chdir(elsewhere)
    explain([checkpoint(run)], output="explained", **FAST)  # the pairs of the fit, which are still there
    (explained_there,) = Path("explained").glob("*/codes.json")
    assert json.loads(explained_there.read_text())["pairs"] == json.loads(at_the_end["codes.json"])["pairs"]

    moved = project.rename(tmp_path / "moved")
    run = moved / "runs" / "version_0"
    output = run_command(capsys, "explain", checkpoint(run), "--device=cpu")
    pattern = (
        r"preferences: .*version_0/config\.yaml names pairs\.jsonl, in which .*: found \d+ (other )?pairs, expected "
    )
    assert_one_error(output, rf"{pattern}.* Run the command in the folder of the fit \({project}\) .*--preferences")
    Path("pairs.jsonl").unlink()
    gone = run_command(capsys, "explain", checkpoint(run), "--device=cpu")
    assert_one_error(
        gone, r"preferences: .*config\.yaml: There is no file .*pairs\.jsonl.* Run the command in the folder"
    )
    assert {name: (run / name).read_bytes() for name in at_the_end} == at_the_end
    monkeypatch.chdir(moved)
    explain([checkpoint(run)], **FAST)
    assert (run / "codes.json").read_bytes() != at_the_end["codes.json"]


@pytest.mark.parametrize("name", ["gaussian", "plain"])
def test_explain_without_codes(runs: dict[str, Path], name: str) -> None:
    assert not list(runs[name].glob("codes.*"))
    found = "no latent" if name == "plain" else "the latent GaussianSpace, which has no codes,"
    with pytest.raises(ConfigError, match=rf"checkpoints: found {found} in .*, expected one with codes, such as"):
        explain([checkpoint(runs[name])], device="cpu")


def test_explain_refuses_settings(runs: dict[str, Path], tmp_path: Path) -> None:
    model = checkpoint(runs["codes"])
    with pytest.raises(ConfigError, match="tokens: found 0, expected at least 1"):
        explain([model], tokens=0)
    with pytest.raises(ConfigError, match="batch_size: found 0, expected at least 1"):
        explain([model], batch_size=0)
    unused = {"limit": 50, "split": "train", "columns": Columns(chosen="better"), "bad_rows": "skip", "max_length": 512}
    for name, value in unused.items():
        found = "settings" if name == "columns" else repr(value)
        message = rf"{name}: found {found} without preferences, expected a file of pairs .* All validation pairs"
        with pytest.raises(ConfigError, match=message):
            explain([model], **{name: value})
    with pytest.raises(ConfigError, match=r"codes: found 7, but the latent of .* has the codes 0 to 2"):
        explain([model], codes=[7], device="cpu")
    folder = tmp_path / "version_0-last"
    other = tmp_path / Path(model).name
    other.write_bytes(Path(model).read_bytes())
    with pytest.raises(ConfigError, match=r"preferences: found no config\.yaml with data in .* Give a file of pairs"):
        explain([str(other)], output=str(folder))
    (tmp_path / "codes.md").write_text("my notes")
    with pytest.raises(ConfigError, match=r"output: .*codes\.md exists and does not explain codes"):
        explain([str(other)])


def test_explain_imports_no_data_class(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder that was downloaded may name any class in its config."""
    (tmp_path / "foreign.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(runs["codes"], run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = {"class_path": "foreign.Pairs", "init_args": {}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"preferences: .*config\.yaml: found data .*foreign has not been imported"):
        explain([checkpoint(run)], device="cpu")
    assert "foreign" not in sys.modules


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of Lightning's own checkpoints, in another folder
def test_validate_explains_the_codes(runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["codes"]
    flags = [f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint(run)}"]
    lpc_lightning(["validate", *flags, f"--trainer.default_root_dir={tmp_path}"])
    assert json.loads((tmp_path / "version_0" / "codes.json").read_text())["pairs"] == 6
