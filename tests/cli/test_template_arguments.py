"""Tests of arguments of the chat template: their types in a config file and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.commands import DATA, MODEL, POLICY, Command

FILE: dict[str, Any] = {
    "role": "Role: critic",
    "mode": "off",
    "year": "2024",
    "version": "1.0",
    "none": "null",
    "braces": "{a: 1}",
    "nested": {"a": "Role: critic", "year": "2024", "flag": True},
    "texts": ["Role: critic", "12", 12, None],
    "flag": False,
    "number": 2.5,
    "nothing": None,
}


def printed(command: Command, *arguments: str) -> Any:
    """Return the arguments of the template that a fit would use."""
    outcome = command("fit", *POLICY, *MODEL, *DATA, *arguments, "--print_config")
    assert outcome.code == 0, outcome.err
    return yaml.safe_load(outcome.out)["data"]["init_args"]["template_kwargs"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"class_path": "SyntheticPreferences", "init_args": {"template_kwargs": FILE}}))
    return f"--data={path}"


def test_values_of_a_file_keep_their_types(command: Command, file: str) -> None:
    assert printed(command, file) == FILE
    assert printed(command, file, "--data.template_kwargs.year=2025") == FILE | {"year": 2025}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("false", False),
        ("12", 12),
        ("-1", -1),
        ("1e-3", 0.001),
        ("null", None),
        ("[1, a]", [1, "a"]),
        ("{k: v}", {"k": "v"}),
        ("critic", "critic"),
        ("Role: critic", "Role: critic"),
        ("Role: critic\nTask: score", "Role: critic\nTask: score"),
        ("- a", "- a"),
        ("2024-01-31", "2024-01-31"),
        ("'12'", "12"),
        ('it\'s "this"', 'it\'s "this"'),
        ("[a", "[a"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("option", ["--data.template_kwargs.x", "--data.init_args.template_kwargs.x"])
def test_values_of_the_command_line(command: Command, option: str, text: str, value: Any) -> None:
    assert printed(command, f"{option}={text}") == {"x": value}
    assert printed(command, "--data.template_kwargs.y=1", option, text) == {"y": 1, "x": value}


def test_whole_value_of_the_command_line(command: Command) -> None:
    assert printed(command, '--data.template_kwargs={"a": "Role: critic", "b": "12", "c": null}') == {
        "a": "Role: critic",
        "b": "12",
        "c": None,
    }
