"""Tests of the folder of an export: what may be replaced, and what is left after an error."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from lpc_lightning.data.tokenization.templates import make_template
from lpc_lightning.distributed.checkpoint_io import CheckpointWriteError
from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.export import export
from lpc_lightning.inference.opening import open_policy
from lpc_lightning.policy import PretrainedPolicy, TinyPolicy
from tests.inference.conftest import CASES, FILES, LATENT_FILES

pytestmark = pytest.mark.slow


def test_a_folder_that_is_not_free(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: .*/file is a file, expected a folder"):
        export(str(checkpoint), str(tmp_path / "file"))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    (mine / "config.json").write_text("{}")
    (mine / "training.json").write_text('{"policy": "mine"}')  # a common name is no sign of an export
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"output: .*/mine is not empty and no earlier export"):
            export(str(checkpoint), str(mine), overwrite=overwrite)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_export_into_the_working_directory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        export(str(checkpoint), ".", overwrite=overwrite)
        assert {path.name for path in Path().iterdir()} == FILES | LATENT_FILES
        assert os.getcwd() == str(tmp_path)


def test_export_checks_the_folder_before_the_model(tmp_path: Path) -> None:
    (tmp_path / ".out.0123.unfinished").mkdir()
    for folder, message in ((tmp_path, "a stopped one has left"), (Path("/proc/out"), "cannot write to /proc ")):
        with pytest.raises(ConfigError, match=f"output: .*{message}"):
            export("no_such.ckpt", str(folder))


def test_export_replaces_only_on_request(checkpoint: Path, fitted: Callable[..., Path], tmp_path: Path) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(
        ConfigError, match=r"output: .*/out holds an earlier export. Expected another folder, or --over"
    ):
        export(str(fitted()), str(folder))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"output: found notes\.txt in .*/out, which export has not written"):
        export(str(fitted()), str(folder), overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    export(str(fitted()), str(folder), overwrite=True)
    assert {file.name for file in folder.iterdir()} == FILES
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_export_through_a_link_keeps_the_link(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    export(str(checkpoint), str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_no_local_path_is_published(exported: dict[str, Path], fitted: Callable[..., Path]) -> None:
    roots = [str(folder) for folder in (exported["codes"].parent, fitted(*CASES["codes"]).parents[2])]
    for folder in exported.values():
        for file in folder.iterdir():
            assert not [root for root in roots if root.encode() in file.read_bytes()]
    origin = json.loads((exported["codes"] / "training.json").read_text())
    assert origin["path"] == "version_0/checkpoints/best.ckpt"


def base_model(folder: Path, template: Callable[[str], str]) -> list[str]:
    """Write a tiny model with a changed chat template, and return the arguments of a fit that starts from it."""
    spec = TinyPolicy(width=16, layers=1, heads=2)
    spec.build().causal_lm.save_pretrained(folder)
    tokenizer = spec.load_tokenizer()
    tokenizer.chat_template = template(str(tokenizer.chat_template))
    tokenizer.save_pretrained(folder)
    return ["--policy=PretrainedPolicy", f"--policy.path={folder}"]


def test_export_prompts_as_its_checkpoint(fitted: Callable[..., Path], tmp_path: Path) -> None:
    """Arguments of the chat template may name files."""
    policy = base_model(tmp_path / "base", lambda template: "{{ guide }}" + template)
    guide = "/usr/share/doc/guide.txt comes first."
    checkpoint = fitted(*policy, f"--data.template_kwargs={json.dumps({'guide': guide})}")
    folder = export(str(checkpoint), str(tmp_path / "out"))
    opened = open_policy(str(folder))
    template = make_template(opened.tokenizer, *opened.template)
    assert template.render([{"role": "user", "content": "Hi"}]).startswith(guide)
    card = (folder / "README.md").read_text()
    assert card.count(guide) == 2  # in the code and among the settings
    assert str(tmp_path) not in card + (folder / "training.json").read_text()


def test_export_has_a_generation_prompt(fitted: Callable[..., Path], tmp_path: Path) -> None:
    """The template of the base model has none, so that the suite adds the header of an answer."""
    policy = base_model(tmp_path / "base", lambda template: template[: template.index("{% if add_generation_prompt")])
    folder = export(str(fitted(*policy)), str(tmp_path / "out"))
    turns = [{"role": "user", "content": "Hi"}]
    render = AutoTokenizer.from_pretrained(folder).apply_chat_template
    text = render([*turns, {"role": "assistant", "content": "yes"}], tokenize=False)
    assert text == render(turns, tokenize=False, add_generation_prompt=True) + text[text.rindex("yes") :]


def test_export_by_its_hub_name(fitted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--ann--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    export(str(fitted(*CASES["codes"], "--data.template=plain")), str(repository / "snapshots" / ("0" * 40)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    opened = open_policy("ann/mine")
    assert (opened.kind, opened.template.kind) == ("export", "plain")
    with pytest.warns(UserWarning, match="found an export with a latent in ann/mine"):
        PretrainedPolicy("ann/mine").check_start()
    (repository / "snapshots" / ("0" * 40) / "training.json").unlink()
    assert open_policy("ann/mine").template.kind == "auto"


def test_a_full_disk_leaves_the_earlier_export_whole(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(str(checkpoint), str(tmp_path / "out"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        with pytest.raises(
            CheckpointWriteError, match=r"output: could not write .*/out: .*Expected a folder with enough space"
        ):
            export(str(checkpoint), str(folder), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [each.name for each in tmp_path.iterdir()] == ["out"]
