"""Tests of README and docs/: code runs, links resolve, commands and options exist."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lpc_lightning.cli import COMMANDS, ENTRY_POINTS, PreferenceCLI
from lpc_lightning.evaluation.ablation.grid import read_grid
from tests import test_losses

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ADD = sorted((ROOT / "docs").glob("add_*.md"))
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
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page not in ADD], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LPC_LIGHTNING_CACHE", str(tmp_path / "cache"))
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile("\n".join(blocks(page, "python")), page, "exec"), module.__dict__)


DESTINATION = re.compile(r"(?:Put it in|goes into)\s+`([^`]+)`")


def follow(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Do what a page says with each block of code: it goes into its own file, and its name into the named packages.

    A block for a file that exists is run among the names of that file. Returns path and content of each file, which are
    names of a module, or settings.
    """
    files: list[tuple[str, dict[str, Any]]] = []
    prose = FENCE.split(page.read_text())[::3]
    for before, (language, text) in zip(prose, FENCE.findall(page.read_text()), strict=False):
        if language not in ("python", "yaml"):
            continue
        path = DESTINATION.findall(before)[-1]
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        name = path.removesuffix(".py").replace("/", ".")
        name = name if name.startswith(("lpc_lightning.", "tests.")) else f"lpc_lightning.{name}"
        if language == "yaml":
            files.append((path, yaml.safe_load(text)))
            continue
        module: ModuleType = ModuleType(name)
        module.__file__ = str(file)
        if (ROOT / path).exists():
            module.__dict__.update(vars(import_module(name)), __file__=str(file))
        known = dict(vars(module))
        exec(compile(text, file, "exec"), module.__dict__)
        new = {key: value for key, value in vars(module).items() if key not in known}
        if (ROOT / path).exists():
            for key, value in new.items():
                monkeypatch.setattr(import_module(name), key, value, raising=False)
        else:
            monkeypatch.setitem(sys.modules, name, module)
        for package in re.findall(r"`([\w/]+)/__init__\.py`", before.rpartition(path)[2]):
            package = package.replace("/", ".").removeprefix("lpc_lightning.")
            home = import_module("lpc_lightning" if package == "lpc_lightning" else f"lpc_lightning.{package}")
            for key, value in new.items():
                if getattr(value, "__module__", None) == name:
                    monkeypatch.setattr(home, key, value, raising=False)
        files.append((path, new))
    return files


@pytest.mark.slow
@pytest.mark.parametrize("page", ADD, ids=name_of)
def test_page_followed_to_the_letter(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPC_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["lpc-lightning"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    files = follow(page, tmp_path, monkeypatch)
    tests = [value for _, names in files for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(*[tmp_path] if "tmp_path" in inspect.signature(test).parameters else [])
    configs = [Path(path) for path, _ in files if path.endswith(".yaml")]
    assert bool(configs) == (page.stem != "add_a_callback")
    for path in configs:
        siblings = [yaml.safe_load(each.read_text())["init_args"] for each in (ROOT / path).parent.glob("*.yaml")]
        option = "latent" if path.parent.name == "latent" else "model"
        tiny = f"--config={ROOT / 'configs/experiment/tiny.yaml'}"
        parsed = Parsed(["fit", tiny, f"--{option}={tmp_path / path}"]).config.fit[option].as_dict()
        stated = yaml.safe_load((tmp_path / path).read_text())
        assert parsed["class_path"] == stated["class_path"]
        assert set(stated["init_args"]) >= set(parsed["init_args"]) & {name for each in siblings for name in each}


def test_added_loss_is_tested_by_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of the page passes every test of the list of losses. Its naive form is one pair in plain arithmetic."""
    files = dict(follow(ROOT / "docs/add_an_algorithm.md", tmp_path, monkeypatch))
    hinge_loss, naive = files["lpc_lightning/losses.py"]["hinge_loss"], test_losses.naive

    def with_hinge(name: str, *numbers: Any) -> Any:
        if name != "hinge":
            return naive(name, *numbers)
        pw, pl, rw, rl, _, _, margin = numbers
        return (1 - 0.1 * ((pw - rw) - (pl - rl)) + margin).clamp(min=0)

    monkeypatch.setitem(test_losses.LOSSES, "hinge", lambda logps: hinge_loss(logps, beta=0.1))
    # D of the golden pairs is 1.6, 0.6, 1.6 and 0.6.
    monkeypatch.setitem(test_losses.EXPECTED, "hinge", [0.84, 0.94, 0.84, 0.94])
    monkeypatch.setattr(test_losses, "naive", with_hinge)
    of_list = [
        test
        for name, test in vars(test_losses).items()
        if name.startswith("test_") and test_losses.every_loss.mark in getattr(test, "pytestmark", [])
    ]
    assert len(of_list) >= 6
    for test in of_list:
        others = dict(mark.args for mark in test.pytestmark if mark is not test_losses.every_loss.mark)
        for values in product(*others.values()):
            test("hinge", **dict(zip(others, values, strict=True)))


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
