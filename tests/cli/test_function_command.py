"""Functions as commands: how settings are spelled, and the help text of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from lpc_lightning.cli.function_command import run_function
from lpc_lightning.errors import ConfigError


def measure(
    models: list[str],
    tasks: list[str] | None = None,
    codes: list[int] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    prior_mode: Literal["mean", "argmax"] | int | None = None,
    data_dir: str | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Measure models.

    And tell what came out.

    Args:
        models: What to measure, with "-" and "," in names.
        tasks: What to measure them on.
        codes: Numbers of codes.
        batch_size: Rows at a time,
            or `auto`.
        prior_mode: How z is taken.
        data_dir: Where data is.
        again: Measure what was measured before.
    """
    return locals()


def ask(*arguments: str) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    default = {"tasks": None, "codes": None, "batch_size": "auto", "prior_mode": None, "data_dir": None, "again": False}
    found = run_function(measure, list(arguments), "measure")
    return {name: value for name, value in found.items() if name not in default or value != default[name]}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("a", {}),
        ("a --batch-size 4", {"batch_size": 4}),
        ("a --batch_size=4", {"batch_size": 4}),
        ("a --data-dir=my-data/some-where", {"data_dir": "my-data/some-where"}),
        ("a --data_dir my-data", {"data_dir": "my-data"}),
        ("a --data-dir x=--y", {"data_dir": "x=--y"}),
        ("a --data-dir 7", {"data_dir": "7"}),
        ("a --tasks one", {"tasks": ["one"]}),
        ("a --tasks one two-three", {"tasks": ["one", "two-three"]}),
        ("a --tasks one,two three", {"tasks": ["one", "two", "three"]}),
        ("a --tasks=one,two", {"tasks": ["one", "two"]}),
        ("a --codes 1 2 --tasks x", {"codes": [1, 2], "tasks": ["x"]}),
        ("a --codes=1,2", {"codes": [1, 2]}),
        ("a --prior-mode 3", {"prior_mode": 3}),
        ("a --prior_mode argmax", {"prior_mode": "argmax"}),
        ("a --again", {"again": True}),
        ("a --again --tasks x", {"again": True, "tasks": ["x"]}),
        ("a --again true", {"again": True}),
        ("a --again=true", {"again": True}),
        ("a --again false", {}),
        ("a --again True", {"again": True}),
        ("a --again FALSE", {}),
        ("a --again yes", {"again": True}),
        ("a --again Off", {}),
    ],
)
def test_settings_are_spelled_in_many_ways(arguments: str, settings: dict[str, Any]) -> None:
    assert ask(*arguments.split()) == {"models": ["a"], **settings}


@pytest.mark.parametrize(
    ("arguments", "models"),
    [
        ("runs/a-b/x,y.ckpt second-one --again", ["runs/a-b/x,y.ckpt", "second-one"]),
        ("--again runs/a-b/x,y.ckpt", ["runs/a-b/x,y.ckpt"]),
        ("--again a b", ["a", "b"]),
        ("a --again true b", ["a", "b"]),
        ("a --again=true b,c d", ["a", "b,c", "d"]),
    ],
)
def test_what_stands_by_itself_stays_as_it_is(arguments: str, models: list[str]) -> None:
    assert ask(*arguments.split()) == {"models": models, "again": True}


@pytest.mark.parametrize("arguments", ["a --batch-size 2 b=1 --codes 1 2", "a --codes=1,2 --batch-size=2 b=1"])
def test_values_stand_between_options(arguments: str) -> None:
    assert ask(*arguments.split()) == {"models": ["a", "b=1"], "batch_size": 2, "codes": [1, 2]}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("", "models: found none, expected a value. `lpc-lightning measure --help` lists the settings."),
        ("a --batch-sise 3", "--batch_sise: found no such setting, did you mean --batch_size?"),
        ("a --batch 3", "--batch: found no such setting, did you mean --batch_size?"),
        ("a --xyz 3", "--xyz: found no such setting. `lpc-lightning measure --help` lists the settings."),
        ("a --batch-size many", "batch_size: found many, expected one of auto, an integer."),
        ("a --codes 1,x", "codes: found x, expected an integer."),
        ("a --prior-mode median", "prior_mode: found median, expected one of mean, argmax, an integer, null."),
    ],
    ids=["no models", "typo", "abbreviation", "unknown", "no number", "no code", "no mode"],
)
def test_impossible_arguments_are_one_line(arguments: str, error: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ask(*arguments.split())
    assert str(raised.value) == error


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("batch_sise", ", did you mean batch_size?"),
        ("model", ", did you mean models?"),
        ("xyz", ". `lpc-lightning measure --help` lists the settings."),
    ],
)
def test_unknown_name_in_a_file_is_one_line(name: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(f"{name}: 3\n")
    with pytest.raises(ConfigError) as raised:
        ask("a", f"--config={tmp_path / 'settings.yaml'}")
    assert str(raised.value) == f"{name}: found no such setting{advice}"


def test_a_value_without_a_setting_is_refused() -> None:
    def generate(model: str, prompt: str = "") -> None:
        """Generate.

        Args:
            model: Where it is.
            prompt: What to answer.
        """

    with pytest.raises(ConfigError, match=r"found best\.ckpt without a setting, .* as in `--model best\.ckpt`\."):
        run_function(generate, ["best.ckpt", "--prompt", "x"], "generate")
    with pytest.raises(ConfigError, match=r"^model: found none, expected a value\. "):
        run_function(generate, ["--prompt", "x"], "generate")


@pytest.mark.parametrize(
    "text", ["null", "~", "None", "3", "true", "[a]", "", "a: b", "-- a-b", "---", "--no-way, why?", "-5"]
)
def test_a_prompt_is_the_text_as_written(text: str, tmp_path: Path) -> None:
    def generate(prompt: str | None = None, output: str | None = "x") -> tuple[str | None, str | None]:
        """Generate.

        Args:
            prompt: What to answer.
            output: Where to write. null: nowhere.
        """
        return prompt, output

    (tmp_path / "settings.yaml").write_text("prompt: another\n")
    for arguments in (["--prompt", text], [f"--prompt={text}"]):
        assert run_function(generate, [f"--config={tmp_path / 'settings.yaml'}", *arguments], "generate") == (text, "x")
    for null in ("null", "~"):
        assert run_function(generate, ["--output", null], "generate") == (None, None)
    assert run_function(generate, ["--output", "# x"], "generate") == (None, "# x")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--data-dir"], "--data_dir: found no value, expected one after it"),
        (["--tasks"], "--tasks: found no value, expected one after it"),
        (["-x"], "-x: found no such setting"),
    ],
)
def test_incomplete_options_are_refused(arguments: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ask("a", *arguments)
    assert str(raised.value) == f"{found}. `lpc-lightning measure --help` lists the settings."


def test_the_help_is_the_docstring(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        ask("--help")
    assert end.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "usage: lpc-lightning measure" in output
    assert "Measure models. And tell what came out." in output
    for text in (
        'models What to measure, with "-" and "," in names. (required',
        "--tasks TASKS [TASKS ...] What to measure them on. (type: str, default: null)",
        "--batch_size BATCH_SIZE Rows at a time, or `auto`. (type: Union[int, Literal['auto']], default: auto)",
        "--again {true,false} Measure what was measured before. (type: bool, default: False)",
    ):
        assert text in output


def test_settings_come_from_a_file_and_flags_win(tmp_path: Any) -> None:
    (tmp_path / "settings.yaml").write_text("models: [a, b]\ntasks: [one]\nbatch_size: 2\n")
    found = run_function(measure, [f"--config={tmp_path / 'settings.yaml'}", "c", "--batch-size", "3"], "measure")
    assert (found["models"], found["tasks"], found["batch_size"]) == (["c"], ["one"], 3)
