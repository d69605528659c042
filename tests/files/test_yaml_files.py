"""Tests of the check of YAML: values that refer to themselves or explode, other encodings, and huge integers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.files.yaml_files import SUFFIXES, check_value, check_yaml, parse_yaml, read_yaml
from tests.fixtures.commands import run_command

CONFIGS = Path(__file__).parents[2] / "configs"
BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "itself": (b"a: 1\nseed_everything: &a [1, *a]\n", "found a value that contains itself"),
    "itself in a map": (b"trainer: &t\n  logger: *t\n", "found a value that contains itself"),
    "merged itself": (b"a: &a\n  <<: *a\n", "found a value that contains itself"),
    "bomb": (BOMB.encode(), "values after its aliases are expanded, expected at most 100000"),
    "latin-1": (
        "trainer: {default_root_dir: é}".encode("latin-1"),
        "found the byte 0xe9 at position 28",
    ),
    "utf-16": ("a: 1".encode("utf-16"), "found the byte 0xff at position 0, expected text in UTF-8"),
    "huge integer": (b"seed_everything: " + b"9" * 5000, "found an integer of 5000 digits, expected at most 18"),
    "huge hexadecimal": (b"seed_everything: 0x" + b"f" * 5000, "found an integer of 5001 digits"),
    "no YAML": (b"a: [1, 2", "found text that is no YAML"),
    "control characters": (b"a: \x00\x01", "found text that is no YAML"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content)
    for read in (read_yaml, check_yaml):
        with pytest.raises(ConfigError, match=message) as caught:
            read(path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    outer = tmp_path / "outer.yaml"
    outer.write_text("policy: hostile.yaml\n")
    with pytest.raises(ConfigError, match=message):
        check_yaml(outer)


@pytest.mark.parametrize("content", ["[" * 5000, "[" * 5000 + "]" * 5000, "- " * 3000 + "1"])
def test_deep_yaml_is_refused(content: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deep\.yaml"):
        parse_yaml(content, "deep.yaml")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory, expected a YAML file"):
        read_yaml(tmp_path / "none.yaml")


def test_shipped_configs_are_read_like_yaml() -> None:
    files = [path for path in CONFIGS.rglob("*") if path.suffix in SUFFIXES]
    assert len(files) > 50
    for path in files:
        check_yaml(path)
        assert read_yaml(path) == yaml.safe_load(path.read_text())


def test_aliases_and_text_are_allowed() -> None:
    text = "a: &a {x: 1}\nb: *a\nc: &c [*a, *a]\nd: {<<: *a}\n"
    assert parse_yaml(text, "text") == yaml.safe_load(text)
    assert parse_yaml("", "nothing") is None
    for value in ("[broken", "a * b & c", "9" * 5000 + " eggs", "-1", "1e-4"):
        check_value(value, "--data.path")
    with pytest.raises(ConfigError, match=r"--model\.beta line 1: found an integer of 5000 digits"):
        check_value("9" * 5000, "--model.beta")


def test_value_that_is_a_comment_is_refused() -> None:
    for value in ("", "null", '"#flip"', "a # b"):
        check_value(value, "--callbacks.marker")
    with pytest.raises(ConfigError, match=r"--callbacks\.marker: found #flip, .* comment, .*: `marker: \"#flip\"`"):
        check_value("#flip", "--callbacks.marker")


COMMANDS = (
    ("fit", "--config={}"),
    ("fit", "--policy", "{}"),
    ("validate", "--config", "{}"),
    ("test", "--trainer={}"),
    ("predict", "--latent={}"),
    ("generate", "--config={}"),
    ("export", "--config={}"),
    ("evaluate", "--config={}"),
    ("adapt", "--config={}"),
    ("ablate", "{}"),
)


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda each: " ".join(each[:2]))
def test_every_command_refuses_hostile_yaml(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, message in HOSTILE.values():
        path = tmp_path / "hostile.yaml"
        path.write_bytes(content)
        outcome = run_command(capsys, *(each.format(path) for each in arguments))
        assert outcome.code == 1
        assert len(outcome.errors) == 1
        assert message in outcome.errors[0]
        assert "Traceback" not in outcome.err
