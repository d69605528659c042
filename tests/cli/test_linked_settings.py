"""Tests of settings of a group that another group fills: they take no value of their own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lpc_lightning.cli.config_arguments import check_config_arguments
from lpc_lightning.errors import ConfigError
from tests.fixtures.commands import CONFIGS, Command, assert_one_error

STOPPING = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: nonsense, strict: true}}"
SPACE = "{class_path: lpc_lightning.latent.MarginalSpace}"
FILES = {
    "trainer.callbacks": f"callbacks: [{STOPPING}]",
    "model.latent": f"{{class_path: lpc_lightning.algorithms.DPO, init_args: {{latent: {SPACE}}}}}",
    "model.policy": "init_args: {policy: {class_path: lpc_lightning.policy.TinyPolicy}}",
}
"""File of the first group that sets a linked setting."""


@pytest.mark.parametrize("how", ["config", "nested", "group", "braces"])
@pytest.mark.parametrize("name", FILES)
def test_linked_setting_in_a_file_is_refused(name: str, how: str, tmp_path: Path) -> None:
    owner, _, group = name.partition(".")
    file, run = tmp_path / "part.yaml", tmp_path / "run.yaml"
    file.write_text(FILES[name])
    braces = FILES[name] if FILES[name].startswith("{") else f"{{{FILES[name]}}}"
    run.write_text(f"{owner}: {braces}" if how == "config" else f"{owner}: part.yaml")
    arguments, place = {
        "config": ([f"--config={run}"], run),
        "nested": (["-c", str(run)], file),
        "group": ([f"--{owner}", str(file)], file),
        "braces": ([f"--{owner}={braces}"], f"--{owner}"),
    }[how]
    message = f"{name}: found a value in {place}, expected none: the group {group} fills this setting. Give it as "
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}`{group}`"):
        check_config_arguments(arguments, takes_groups=True)


@pytest.mark.parametrize(
    ("argument", "instead"),
    [
        ("--trainer.callbacks+=RunSummary", "--callbacks+=RunSummary"),
        ("--trainer.callbacks=null", "--callbacks=null"),
        ("--model.latent=MarginalSpace", "--latent=MarginalSpace"),
        ("--model.latent.num_codes=3", "--latent.num_codes=3"),
        ("--model.init_args.policy=TinyPolicy", "--policy=TinyPolicy"),
    ],
)
def test_linked_option_is_refused(argument: str, instead: str) -> None:
    option, _, value = argument.partition("=")
    message = rf"^{re.escape(option)}: found {value}, expected no value: .* Give it as `{re.escape(instead)}`\.$"
    for arguments in ([argument], [option, value]):
        with pytest.raises(ConfigError, match=message):
            check_config_arguments(arguments, takes_groups=True)


@pytest.mark.parametrize(
    "argument", ["--model.latent_lr=0.1", "--trainer={callbacks: null}", "--model={class_path: DPO}", "--latent={}"]
)
def test_settings_that_are_not_linked_pass(argument: str) -> None:
    check_config_arguments([argument], takes_groups=True)


def test_callback_in_the_trainer_is_one_line(command: Command, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(f"trainer: {{callbacks: [{STOPPING}]}}")
    tiny = f"--config={CONFIGS / 'experiment' / 'tiny.yaml'}"
    output = command("fit", tiny, "--config", str(tmp_path / "more.yaml"))
    assert_one_error(output, r"trainer\.callbacks: found a value in .*more\.yaml, .* or as `--callbacks FILE`\.")
