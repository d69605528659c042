"""Commands replace nothing that they have not written, and names stay in the output folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.comparison.command import name_models
from lpc_lightning.files.output_paths import (
    check_file,
    check_folder,
    check_name,
    claim_output_file,
    claim_output_folder,
)
from lpc_lightning.policy import TinyPolicy
from tests.fixtures.commands import run_command

GRID = "configs/ablation/noise_tiny.yaml"
COMMANDS = {
    "export": "--checkpoint none.ckpt --output {}",
    "generate": "--model none --prompt x --output {}",
    "alpaca": "--model none --instructions none.json --output {}",
    "evaluate": "none --tasks none --preferences none.jsonl --output {}",
    "adapt": "none.ckpt --preferences none.jsonl --output {}",
    "ablate": f"{GRID} --output {{}}",
    "report": "none --out {}",
    "configs": "--output {}",
    "prepare": "--output {}",
    "prepare ": "--pairs {}",
    "demo": "--output {}",
}


@pytest.mark.parametrize("kind", ["pipe", "link"])
@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_is_no_folder_or_file_is_refused(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target.jsonl"
    os.mkfifo(target) if kind == "pipe" else target.symlink_to("nowhere")
    outcome = run_command(capsys, name.strip(), *COMMANDS[name].format(target).split())
    assert outcome.code == 1
    expected = "a pipe" if kind == "pipe" else "a link to nothing"
    assert outcome.errors[0].split(": ", 1)[1].startswith(f"{target} is {expected}, expected a f")
    assert stat.S_ISFIFO(target.lstat().st_mode) if kind == "pipe" else target.readlink() == Path("nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["target.jsonl"]


@pytest.mark.parametrize("name", ["generate", "alpaca", "adapt", "report"])
def test_output_of_a_running_command_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "out"
    claim = claim_output_folder if name in ("adapt", "report") else claim_output_file
    (tmp_path / "none.json").write_text('[{"instruction": "Why?"}]')
    monkeypatch.chdir(tmp_path)
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(tmp_path / "none")
    spec.load_tokenizer().save_pretrained(tmp_path / "none")
    with claim(target, "output"):
        outcome = run_command(capsys, name, *COMMANDS[name].format(target).split())
    assert outcome.code == 1
    assert f": another command writes to {target}, expected a path of its own" in outcome.errors[0]
    assert not target.exists()
    assert not list(target.parent.iterdir())
    with claim(target, "output"):  # free again
        pass


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("report", "{}/runs --out {}/mine"),
        ("prepare", "--output {}/mine"),
        ("prepare", "--pairs {}/mine/report.jsonl"),
        ("generate", "--model none --prompt x --output {}/mine/report.jsonl"),
        ("configs", "--output {}/mine"),
    ],
)
def test_files_of_the_user_are_kept(
    name: str, arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    (mine / "policy").mkdir(parents=True)
    for file in ("report.md", "report.jsonl", "policy/tiny.yaml"):
        (mine / file).write_text("years of work")
    outcome = run_command(capsys, name, *arguments.replace("{}", str(tmp_path)).split())
    assert outcome.code == 1
    assert "mine" in outcome.errors[0]
    assert {
        str(path.relative_to(mine)): path.read_text() for path in mine.rglob("*") if path.is_file()
    } == dict.fromkeys(("report.md", "report.jsonl", "policy/tiny.yaml"), "years of work")


def test_folders_and_files_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("", "new", "link"):
        check_folder(tmp_path / name, "output")
    for name in ("new", "file"):
        check_file(tmp_path / name, "output")
    with pytest.raises(ConfigError, match=r"output: /dev/null is a device, expected a file"):
        check_file(Path("/dev/null"), "output")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../../x", "a/b", "/tmp/x", "a\\b", ".hidden", "a\nb", "a\0"])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"names: found .*, expected a name for a folder"):
        check_name(name, "names")
    with pytest.raises(ConfigError, match=r"names: found"):
        name_models(["some/model"], [name])


@pytest.mark.parametrize("path", [".", "..", "/", "../..", ".hidden", "runs/x/best.ckpt", "somebody/model", "a.gguf"])
def test_names_from_paths_stay_in_the_folder(path: str) -> None:
    ((name, model),) = name_models([path], None)
    assert model == path
    check_name(name, "names")
