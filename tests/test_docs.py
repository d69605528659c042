"""Tests of README and docs/: code runs, links resolve, commands and options exist."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.cli.commands import COMMANDS, ENTRY_POINTS
from lpc_lightning.cli.config_arguments import check_config_arguments
from lpc_lightning.evaluation.ablation.grids.grid import read_grid
from tests import test_losses
from tests.fixtures.processes import ForkedProcess

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = [ROOT / name for name in ("evaluation/ablation/cells/ray_cluster.py", "lpc_lightning/cli/run_loggers.py")]
UNPINNED = ("pre-commit", "alpaca-eval")
"""Tools that the project does not import."""
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


def benchmark_commands(page: Path) -> list[list[str]]:
    """Return the module and the arguments of each `python -m benchmarks...` of a page."""
    text = page.read_text()
    lines = "\n".join(block for _, block in FENCE.findall(text)).replace("\\\n", " ").splitlines()
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    found = [re.fullmatch(r"(?:\w+=\S+ )?python -m (benchmarks\b.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in found if match]


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


def follow(page: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Do what a page says with each block: it goes into its own file, and its names into the named packages.

    A block for a file that exists is run among the names of that file. The classes stay in this process.

    Returns:
        What each file adds, by path: names of a module, or settings.
    """
    added: dict[str, dict[str, Any]] = {}
    text = page.read_text()
    for before, (language, block) in zip(FENCE.split(text)[::3], FENCE.findall(text), strict=False):
        if language not in ("python", "yaml"):
            continue
        path = DESTINATION.findall(before)[-1]
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block)
        if language == "yaml":
            added[path] = yaml.safe_load(block)
            continue
        name = module_name(path.removesuffix(".py"))
        exists = (ROOT / path).exists()
        module = import_module(name) if exists else ModuleType(name)
        module.__file__ = str(file)  # where classes look for their source
        sys.modules[name] = module
        known = set(vars(module))
        exec(compile(block, file, "exec"), vars(module))
        added[path] = {key: value for key, value in vars(module).items() if key not in known}
        own = {key: each for key, each in added[path].items() if getattr(each, "__module__", None) == name}
        for package in re.findall(r"`([\w/]+)/__init__\.py`", before.rpartition(path)[2]):
            vars(import_module(module_name(package))).update(own)
    return added


def module_name(path: str) -> str:
    name = path.replace("/", ".")
    return name if name.partition(".")[0] in ("lpc_lightning", "tests") else f"lpc_lightning.{name}"


def run_page(page: Path, folder: Path) -> None:
    """Follow a page, run its tests and parse its config."""
    sys.argv[:] = ["lpc-lightning"]
    added = follow(page, folder)
    tests = [value for names in added.values() for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(*[folder] if "tmp_path" in inspect.signature(test).parameters else [])
    configs = [Path(path) for path in added if path.endswith(".yaml")]
    assert bool(configs) == (page.stem != "add_a_callback")
    for path in configs:
        siblings = [yaml.safe_load(each.read_text())["init_args"] for each in (ROOT / path).parent.glob("*.yaml")]
        option = "latent" if path.parent.name == "latent" else "model"
        tiny = f"--config={ROOT / 'configs/experiment/tiny.yaml'}"
        parsed = Parsed(["fit", tiny, f"--{option}={folder / path}"]).config.fit[option].as_dict()
        stated = added[str(path)]
        assert parsed["class_path"] == stated["class_path"]
        assert set(stated["init_args"]) >= set(parsed["init_args"]) & {name for each in siblings for name in each}


def run_list_of_losses(page: Path, folder: Path) -> None:
    """Add the page's loss to the list of losses, and run all tests of the list. Its naive form is plain arithmetic."""
    hinge_loss, naive = follow(page, folder)["lpc_lightning/losses.py"]["hinge_loss"], test_losses.naive

    def with_hinge(name: str, *numbers: Any) -> Any:
        if name != "hinge":
            return naive(name, *numbers)
        pw, pl, rw, rl, _, _, margin = numbers
        return (1 - 0.1 * ((pw - rw) - (pl - rl)) + margin).clamp(min=0)

    test_losses.LOSSES["hinge"] = lambda logps: hinge_loss(logps, beta=0.1)
    # D of the golden pairs is 1.6, 0.6, 1.6 and 0.6.
    test_losses.EXPECTED["hinge"] = [0.84, 0.94, 0.84, 0.94]
    test_losses.naive = with_hinge
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "page"),
    [*((run_page, page) for page in ADD), (run_list_of_losses, ROOT / "docs/add_an_algorithm.md")],
    ids=lambda value: getattr(value, "stem", None) or value.__name__,
)
def test_page_followed_to_the_letter(run: Callable[..., None], page: Path, tmp_path: Path) -> None:
    """In a process of its own: the parser would find the added classes in later tests."""
    variables = {"LPC_LIGHTNING_CACHE": str(tmp_path / "cache"), "PL_GLOBAL_SEED": "0"}
    process = ForkedProcess(run, page, tmp_path, log=tmp_path / "log", **variables)
    assert process.wait() == 0, process.errors


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    links = LINK.findall(FENCE.sub("", page.read_text()))
    for link in (link for link in links if not link.startswith(("http://", "https://"))):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_export_page_says_how_to_score_an_answer() -> None:
    text = " ".join((ROOT / "docs/export.md").read_text().split())
    (part,) = re.findall(r"\*\*Scores of an answer\.\*\*.*?(?=\*\*)", text)
    for name in ("prompt_end", "attention_mask", "lpc-lightning evaluate", "hf"):
        assert f"`{name}`" in part


def test_index_lists_every_page() -> None:
    linked = set(LINK.findall((ROOT / "docs/index.md").read_text()))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def test_readme_length() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 900


def test_no_page_scores_the_pairs_of_training() -> None:
    trained, scored = set[str](), set[str]()
    for _, _, *words in (command for page in PAGES for command in commands(page)):
        for option, value in pairwise(words):
            trained |= {value} if option == "--data.path" else set()
            scored |= {value} if option == "--preferences" else set()
    assert trained
    assert scored
    assert not trained & scored


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/README.md", *CODE], ids=name_of)
def test_installs_are_constrained(page: Path) -> None:
    for rest in re.findall(r"pip install ([^`\n]*)", page.read_text()):
        assert "-c" in rest.split() or rest.split()[0] in UNPINNED, rest


@pytest.mark.parametrize("page", [*PAGES, ROOT / ".ci/run"], ids=name_of)
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    assert "../shared" not in text or page.name == "run"
    for path in set(re.findall(r"(?<![\w/$}-])(?:configs|benchmarks|tests|lpc_lightning)/[\w/.-]*\w", text)):
        new = page.stem.startswith("add_")  # these pages name files that the reader writes
        assert (ROOT / path).exists() or (new and (ROOT / path).parent.is_dir()), path


def function_of(command: str) -> Callable[..., Any]:
    """Return the function that defines the command's options by its parameters."""
    if command in COMMANDS:
        module, name = COMMANDS[command].run.args[0].split(":")  # type: ignore[attr-defined]
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
    for _, command, *words in commands(page):
        if command in FIT:
            if not any(word.endswith(".help") for word in words) and "FILE" not in words and (given := replaced(words)):
                check_config_arguments(given, takes_groups=True)
                Parsed(["fit", *given])
            continue
        known = {"config", *inspect.signature(function_of(command)).parameters}
        options = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
        assert options <= known, (command, options - known)
        if command == "ablate" and words[0].endswith(".yaml"):
            given = [word for word in words if "=" in word and not word.startswith("--")]
            assert read_grid(ROOT / words[0]).with_changes(given).cells()


def parse_only(parse: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a parser that parses and ends the program."""

    def parse_and_exit(self: ArgumentParser) -> None:
        parse(self)
        self.exit()

    return parse_and_exit


@pytest.mark.parametrize("page", [page for page in [*PAGES, BENCHMARKS] if benchmark_commands(page)], ids=name_of)
def test_benchmark_options_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(ArgumentParser, name, parse_only(getattr(ArgumentParser, name)))
    for module, *words in benchmark_commands(page):
        is_package = find_spec(module).submodule_search_locations is not None  # type: ignore[union-attr]
        main = import_module(f"{module}.__main__" if is_package else module).main
        if words:
            monkeypatch.setattr("sys.argv", [module, *words])
            with pytest.raises(SystemExit) as outcome:
                main()
            assert outcome.value.code in (None, 0), (module, words)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= targets, page
