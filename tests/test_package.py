"""Tests of the package: its public names and the direction of its imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lpc_lightning

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"errors"},
    {"types", "seeding", "transfer", "clustered_means"},
    {"files"},
    {"loggers"},
    {"losses", "latent", "policy", "data"},
    {"distributed", "robust"},
    {"reference"},
    {"algorithms"},
    {"inference"},
    {"cli"},
    {"__main__"},
)
"""Parts of the method, lowest first. A part imports from its own layer's name or from lower layers only."""
EVALUATION = (
    {"provenance", "tables", "named_files"},
    {"samples"},
    {"statistics"},
    {"figures"},
    {"line_panels"},
    {"benchmarks"},
    {"accuracy"},
    {"codebook"},
    {"comparison"},
    {"adaptation"},
    {"ablation"},
    {"report"},
    {"demo"},
)
"""The same for evaluation."""


def modules(folder: Path) -> Iterator[tuple[Path, ast.ImportFrom]]:
    """Yield every `from lpc_lightning... import ...` below a folder, with its file. Links are not followed."""
    for path in sorted(path for path in folder.rglob("*.py") if path.resolve().is_relative_to(folder)):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lpc_lightning."):
                yield path, node


def part(path: Path, folder: Path) -> str:
    """Return the part of a folder that a file belongs to."""
    return path.relative_to(folder).parts[0].removesuffix(".py")


def rank(name: str, layers: tuple[set[str], ...]) -> int:
    """Return the number of a part's layer. An unknown part is above all others, so that the test fails for it."""
    return next((number for number, layer in enumerate(layers) if name in layer), len(layers))


def wrong_imports(folder: Path, prefix: str, layers: tuple[set[str], ...]) -> list[str]:
    """Return the imports that point upwards or sideways."""
    wrong = []
    for path, node in modules(folder):
        name, module = part(path, folder), str(node.module)
        if name == "__init__" or not module.startswith(f"{prefix}."):
            continue
        target = module.removeprefix(f"{prefix}.").split(".")[0]
        if target != name and rank(target, layers) >= rank(name, layers):
            wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {module}")
    return wrong


def test_imports_of_the_method_point_down() -> None:
    assert not wrong_imports(ROOT / "lpc_lightning", "lpc_lightning", LAYERS)


def test_imports_of_evaluation_point_down() -> None:
    assert not wrong_imports(ROOT / "evaluation", "lpc_lightning.evaluation", EVALUATION)


@pytest.mark.parametrize(("folder", "forbidden"), [("lpc_lightning", "evaluation"), ("lpc_lightning", "callbacks")])
def test_the_method_imports_nothing_above_it(folder: str, forbidden: str) -> None:
    above = [(path, node.lineno) for path, node in modules(ROOT / folder) if f".{forbidden}" in str(node.module)]
    assert not above


def test_evaluation_imports_no_callback() -> None:
    assert not [path for path, node in modules(ROOT / "evaluation") if ".callbacks" in str(node.module)]


def test_folders_of_evaluation_hold_few_files() -> None:
    folders = [folder for folder in (ROOT / "evaluation").rglob("*") if folder.is_dir()]
    assert len(folders) > 5
    assert max(len(list(folder.glob("*.py"))) for folder in folders) <= 15


@pytest.fixture(scope="module")
def definitions() -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of the tests."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]


def test_names_of_tests_are_short(definitions: list[ast.FunctionDef | ast.ClassDef]) -> None:
    assert not [node.name for node in definitions if node.name.startswith("test_") and len(node.name) > 50]


def test_marks_are_on_tests(definitions: list[ast.FunctionDef | ast.ClassDef]) -> None:
    """A class or function put between a mark and its test takes the mark."""
    marked = [node for node in definitions if any("pytest.mark." in ast.unparse(mark) for mark in node.decorator_list)]
    assert not [node.name for node in marked if not node.name.startswith(("test_", "Test"))]


@pytest.mark.slow
def test_losses_and_latent_need_only_torch() -> None:
    heavy = {"transformers", "lightning", "datasets"}
    code = f"import sys, lpc_lightning.losses, lpc_lightning.latent; print(*({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not run.stdout.split()


@pytest.mark.parametrize("name", lpc_lightning.__all__)
def test_public_names_are_classes(name: str) -> None:
    assert isinstance(getattr(lpc_lightning, name), type)


def test_an_unknown_public_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lpc_lightning.Nothing
