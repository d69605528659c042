"""Settings that errors, help texts and docstrings name exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Trainer

from lpc_lightning import algorithms, data, inference, latent, policy
from lpc_lightning.algorithms import PreferenceModule
from lpc_lightning.data import PreferenceDataModule
from lpc_lightning.latent import LatentSpace
from lpc_lightning.policy import PolicySpec

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"(?<![\w./])(?:--)?(data|model|policy|latent|trainer)\.([a-z]\w+)")
CODE = ROOT / "lpc_lightning" / "inference" / "card.py"
"""A model card holds Python code, where `model` is a variable."""


def settings(module: object, base: type) -> set[str]:
    """Return the arguments of all subclasses of `base` that a package exports, and of their base classes."""
    exported = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, base)]
    classes = {ancestor for each in exported for ancestor in each.__mro__ if "__init__" in vars(ancestor)}
    return {name for each in classes for name in inspect.signature(each.__init__).parameters}  # type: ignore[misc]


def named_settings() -> Iterator[tuple[str, str, str]]:
    """Yield place, group and name of each setting in the texts of the source."""
    for folder in ("lpc_lightning", "callbacks", "evaluation"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    path != CODE
                    and isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and " " in node.value
                ):
                    for group, name in NAME.findall(node.value):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", group, name


def test_named_settings_exist() -> None:
    known = {
        "data": settings(data, PreferenceDataModule),
        "model": settings(algorithms, PreferenceModule),
        "policy": settings(policy, PolicySpec) | settings(inference, PolicySpec),
        "latent": settings(latent, LatentSpace),
        "trainer": set(inspect.signature(Trainer.__init__).parameters),
    }
    for group in ("data", "model", "policy", "latent"):
        known[group].add("help")  # the option of jsonargparse for the settings of a class
    named = list(named_settings())
    assert len(named) > 100
    assert [each for each in named if each[2] not in known[each[1]]] == []
