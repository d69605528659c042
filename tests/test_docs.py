"""Tests of README and docs/: code runs, links resolve, commands and options exist."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lpc_lightning.cli import COMMANDS, ENTRY_POINTS, PreferenceCLI
from lpc_lightning.evaluation.ablation.grid import read_grid

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FIT = ("fit", "validate", "test", "predict")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """Return each command of a page as words, without comments, continuation marks and text after a pipe."""
    lines = "\n".join(blocks(page, "")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition(">")[0], comments=True) for line in lines if line.startswith("lpc-lightning ")]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, in GitHub's form."""
    text = FENCE.sub("", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LPC_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), module.__dict__)
    tests = [value for name, value in vars(module).items() if name.startswith("test_")]
    assert tests or not page.stem.startswith("add_")
    for test in tests:
        test(*[tmp_path] if "tmp_path" in inspect.signature(test).parameters else [])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    links = LINK.findall(FENCE.sub("", page.read_text()))
    for link in (link for link in links if not link.startswith(("http://", "https://"))):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_index_lists_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs/index.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def test_readme_length() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    assert "../shared" not in text
    for path in set(re.findall(r"(?<![\w/$}-])(?:configs|benchmarks|tests|lpc_lightning)/[\w/.-]*\w", text)):
        new = page.stem.startswith("add_")  # these pages name files that the reader writes
        assert (ROOT / path).exists() or (new and (ROOT / path).parent.is_dir()), path


def function_of(command: str) -> Callable[..., Any]:
    """Return the function that defines the command's options by its parameters."""
    if command in COMMANDS:
        module, name = COMMANDS[command][0].args[0].split(":")  # type: ignore[attr-defined]
        return getattr(import_module(module), name)
    (entry,) = entry_points(group=ENTRY_POINTS, name=command)
    return getattr(import_module(entry.module), command)


class Parsed(PreferenceCLI):
    """Command line that parses and runs nothing."""

    def instantiate_classes(self) -> None:
        """Do nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def replaced(words: list[str]) -> list[str]:
    """Return the arguments of `fit` with an existing config in place of a run's, without checkpoints and help."""
    words = [re.sub(r"^runs/version_\d/config.yaml$", str(ROOT / "configs/experiment/tiny.yaml"), w) for w in words]
    if "--ckpt_path" in words:
        del words[(at := words.index("--ckpt_path")) : at + 2]
    return [word for word in words if word not in ("--print_config", "--help")]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_command_options_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["lpc-lightning"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    for _, command, *words in commands(page):
        if command in FIT:
            if not any(word.endswith(".help") for word in words) and "FILE" not in words and (given := replaced(words)):
                Parsed(["fit", *given])
            continue
        known = {"config", *inspect.signature(function_of(command)).parameters}
        options = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
        assert options <= known, (command, options - known)
        if command == "ablate" and words[0].endswith(".yaml"):
            given = [word for word in words if "=" in word and not word.startswith("--")]
            assert read_grid(ROOT / words[0]).with_changes(given).cells()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= targets, page
