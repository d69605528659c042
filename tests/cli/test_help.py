"""Tests of help and usage: every command and every setting is listed and explained."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.cli import PreferenceCLI
from lpc_lightning.cli.commands import commands
from lpc_lightning.cli.prepare import prepare
from lpc_lightning.cli.ship_configs import configs
from lpc_lightning.evaluation.adaptation.command import adapt
from lpc_lightning.evaluation.comparison.command import evaluate
from lpc_lightning.inference.alpaca import alpaca
from lpc_lightning.inference.export import export
from lpc_lightning.inference.generate import generate
from tests.fixtures.commands import PLAIN, Command

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command(command: Command, flag: str) -> None:
    output = command(flag)
    assert output.code == 0
    assert output.err == ""
    text = " ".join(output.out.split())
    for name, known in commands().items():
        assert re.search(rf"^  {name} ", output.out, re.M)
        assert f" {name} {known.summary} " in text
    assert max(map(len, output.out.splitlines())) <= 80


FUNCTIONS = {
    "prepare": prepare,
    "configs": configs,
    "export": export,
    "generate": generate,
    "alpaca": alpaca,
    "evaluate": evaluate,
    "adapt": adapt,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_command_help_explains_every_setting(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    output = command(name, "--help")
    assert output.code == 0
    message = dict(
        re.findall(r"^  (?:--)?(\w+)[ ,].*?(?: {2,}|\n {24})(\S.*?) \((?:required, )?type: ", output.out, re.M)
    )
    assert set(inspect.signature(FUNCTIONS[name]).parameters) <= set(message)
    assert all(len(meaning.split()) > 1 for meaning in message.values())


RECORDER = """
import atexit, os, sys
atexit.register(lambda: open(os.environ["RECORD"], "w").write(" ".join(sys.modules)))
"""
"""Run at the start of the program: at its end it writes the names of all imported modules."""


@pytest.mark.slow
def test_installed_program_prints_the_usage_alone(command: Command, tmp_path: Path) -> None:
    """The usage names the plugins, and imports none: lm-eval takes seconds.

    With bitsandbytes, on a processor with AVX512-BF16, the import of the commands would warn of a missing kernel.
    """
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "RECORD": str(tmp_path / "modules")}
    program = Path(sys.executable).with_name("lpc-lightning")
    done = subprocess.run([program, "--help"], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == (command("--help").out, "")
    assert done.stdout.startswith("usage: lpc-lightning COMMAND")
    assert re.search("evaluate +benchmarks and preference accuracy of any models, side by side\n", done.stdout)
    modules = set((tmp_path / "modules").read_text().split())
    assert "lpc_lightning.cli" in modules
    assert not {"lpc_lightning.evaluation.comparison.command", "lm_eval"} & modules


@pytest.mark.parametrize("name", ["fit", "generate", "evaluate", "report", "adapt", "export"])
def test_missing_arguments_are_an_error_line(command: Command, name: str) -> None:
    output = command(name)
    assert output.code in (1, 2)
    assert "error: " in output.err


def test_usage_explains_commands_without_their_name() -> None:
    for name, command in commands().items():
        assert command.summary, name
        assert not re.match(rf"(the )?command|.*`{name}`", command.summary), name


@pytest.mark.parametrize(
    ("arguments", "error"), [([], ""), (["fot"], "error: found command 'fot', expected one of fit, ")]
)
def test_unknown_command_lists_the_known_ones(command: Command, arguments: list[str], error: str) -> None:
    output = command(*arguments)
    assert output.code == 2
    assert output.out == ""
    assert "usage: lpc-lightning COMMAND" in output.err
    assert error in output.err


def test_fit_help_lists_every_group(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    output = command("fit", "--help")
    assert output.code == 0
    for group in (
        "policy",
        "model",
        "latent",
        "data",
        "callbacks",
        "trainer.max_epochs",
        "ckpt_path",
        "seed_everything",
    ):
        assert re.search(rf"^  (-c CONFIG, )?--{group}( |$)", output.out, re.M), group
    assert "The latent space of Latent Preference Coding. null is the plain algorithm." in output.out


def test_fit_help_starts_with_its_groups(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = command("fit", "--help")
    assert output.out.startswith("usage: lpc-lightning fit ")  # `lpc-lightning OPTIONS fit` is an error
    description = " ".join(output.out.partition("\n\n")[2].partition("\n\n")[0].split())
    assert description.startswith("Train a policy on preference pairs. The settings are in groups")
    assert re.search("--model.help DPO,.* --data.help PreferenceData", description)


class ParsedOnly(PreferenceCLI):
    """Command line that builds and runs nothing."""

    def instantiate_classes(self) -> None:
        """Do nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr("sys.argv", ["lpc-lightning"])  # Lightning warns of arguments in two places
    return ParsedOnly(["fit", *arguments]).config.fit


@pytest.mark.filterwarnings("ignore:No seed found")
@pytest.mark.parametrize(("variable", "seed"), [(None, 0), ("7", 7)])
def test_help_states_the_default_seed(
    command: Command, monkeypatch: pytest.MonkeyPatch, variable: str | None, seed: int
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    help_text = command("fit", "--help").out
    assert "random seed" not in help_text
    assert "true: the environment variable PL_GLOBAL_SEED, or 0 if it is unset. (" in help_text
    monkeypatch.setenv("PL_GLOBAL_SEED", variable or "")
    if variable is None:
        monkeypatch.delenv("PL_GLOBAL_SEED")
    assert parsed(monkeypatch, *PLAIN[:-1]).seed_everything == seed


def test_help_states_defaults_of_the_trainer(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    help_text = command("fit", "--help").out
    for setting, stated in {
        "precision": "null: bf16-mixed if .*, otherwise 32-true.",
        "logger": "null or true: TensorBoard.",
        "default_root_dir": "null: runs.",
        "gradient_clip_val": "Policy and latent are clipped separately",
    }.items():
        line = next(re.finditer(rf"^  --trainer\.{setting} .*(\n {{24}}.*)?", help_text, re.M))[0]
        assert re.search(stated, line), line
        assert "Default: " not in line
    settings = parsed(monkeypatch, *PLAIN).trainer
    assert (settings.logger, settings.default_root_dir) == (None, None)


SETTINGS = {
    ("model", "DPO"): ["beta", "robust_loss", "latent_lr", "lr_schedule", "warmup_ratio", "optimizer"],
    ("model", "IPO"): ["beta", "length_average"],
    ("model", "SimPO"): ["beta", "gamma_beta_ratio"],
    ("model", "KTO"): ["beta", "desirable_weight", "undesirable_weight", "reference_point", "reference"],
    ("model", "ORPO"): ["beta", "latent_lr"],
    ("latent", "GumbelSpace"): [
        "tau",
        "hard",
        "g",
        "kl_weight",
        "free_bits",
        "num_codes",
        "init_logit_std",
        "prior_mode",
    ],
    ("latent", "MarginalSpace"): ["num_codes", "init_logit_std", "prior_mode", "detach", "hidden"],
    ("latent", "GaussianSpace"): ["num_codes", "g", "kl_weight"],
    ("latent", "VectorSpace"): ["init_logit_std"],
    ("policy", "TinyPolicy"): ["family", "width", "dtype", "attention", "lora", "gradient_checkpointing"],
    ("policy", "PretrainedPolicy"): ["path", "revision", "tokenizer", "adapter", "merge_adapter", "lora"],
    ("policy", "TrainedPolicy"): ["path", "keep_latent", "lora", "dtype"],
    ("data", "PreferenceData"): ["path", "validation_share", "columns", "batch_size", "layout", "too_long", "bad_rows"],
    ("data", "SyntheticPreferences"): ["deciding", "train_pairs", "num_workers", "cache_dir"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), list(SETTINGS), ids=lambda value: value)
def test_class_help_explains_every_setting(
    command: Command, monkeypatch: pytest.MonkeyPatch, group: str, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    output = command("fit", f"--{group}.help", name)
    assert output.code == 0
    line = rf"^  --{group}\.(\w+)[ ,].*?(?: {{2,}}|\n {{24}})(\S.*?) \((?:required, )?type: "
    message = dict(re.findall(line, output.out, re.M))
    assert set(SETTINGS[group, name]) <= set(message)
    silent = {setting for setting, meaning in message.items() if len(meaning.split()) < 2}
    assert not silent
