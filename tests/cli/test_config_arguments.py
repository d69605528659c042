"""Tests of the check of config files and groups before the parser reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lpc_lightning.cli.config_arguments import check_config_arguments
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.grid import read_grid
from tests.fixtures.commands import CONFIGS

TINY = f"--config={CONFIGS / 'experiment' / 'tiny.yaml'}"
DEMO = f"--config={CONFIGS / 'experiment' / 'demo.yaml'}"
LABEL_FLIP = f"--callbacks+={CONFIGS / 'callbacks' / 'label_flip.yaml'}"
CSV = str(CONFIGS / "logger" / "csv.yaml")
TUNING = f"--callbacks={CONFIGS / 'callbacks' / 'tuning.yaml'}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--callbacks", "LabelFlipNoise"], "callbacks: found LabelFlipNoise, expected a file or null. `--callbacks+="),
        (["--trainer", "cpu"], "trainer: found cpu, expected a file such as configs/trainer/cpu.yaml. Single settings"),
        (["--config", "tiny"], "--config: found no file tiny in "),
    ],
    ids=str,
)
def test_value_that_is_no_file(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_config_arguments(arguments, takes_groups=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [TINY, "--latent.num_codes=8"],
        [DEMO, "--latent", "null", "--latent.num_codes", "8"],
        [DEMO, TINY.replace("tiny.yaml", "smollm2.yaml"), "--model", "DPO", "--latent=null", "--latent.num_codes=8"],
        ["--latent.num_codes=8", "--latent=MarginalSpace"],
    ],
    ids=str,
)
def test_setting_of_a_group_without_a_class(arguments: list[str]) -> None:
    message = r"latent: found no class for --latent\.num_codes, expected one before it, as in `--latent MarginalSpace`"
    with pytest.raises(ConfigError, match=message):
        check_config_arguments(arguments, takes_groups=True)


def test_list_in_a_file_of_a_group(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match=r"^--policy: found a list in .*list\.yaml, expected settings by name, as in"):
        check_config_arguments(["--policy", str(tmp_path / "list.yaml")], takes_groups=True)


def test_setting_of_no_callback() -> None:
    with pytest.raises(ConfigError, match=r"callbacks: found no class for --callbacks\.rate"):
        check_config_arguments(["--callbacks.rate=0.3", "--callbacks+=LabelFlipNoise"], takes_groups=True)


@pytest.mark.parametrize("option", ["--config", "-c", "--policy"])
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_file_of_another_group_is_named(option: str, path: Path) -> None:
    group = {"algorithm": "model", "logger": "trainer.logger"}.get(path.parent.name, path.parent.name)
    if group in ("ablation", "experiment", option.removeprefix("--")):
        check_config_arguments([option, str(path)], takes_groups=True)
        return
    message = f"{option}: found {path}, which is a file of group {group}, expected .*Give it as `--{group} {path}`"
    with pytest.raises(ConfigError, match=message):
        check_config_arguments([option, str(path)], takes_groups=True)


@pytest.mark.parametrize(
    "arguments",
    [
        [DEMO, "--latent.num_codes=8"],
        [TINY, "--latent", "GumbelSpace", "--latent.num_codes=8"],
        [TINY, "--latent", "my_package.MySpace", "--latent.width", "3"],
        [TINY, "--latent", "{class_path: MarginalSpace}", "--latent.num_codes=8"],
        [TINY, "--latent=null", "--model", "IPO", "--model.beta", "0.2"],
        [TINY, "--callbacks.rate", "0.3"],
        [TINY, "--model.beta=0.7", "--model", "IPO"],
        [TINY, "--data", str(CONFIGS / "data" / "hh.yaml"), "--data.max_length=64", TUNING, TUNING],
        [TINY, "--data.system_turns=fold", "--data.print_pair", "false", "--data", str(CONFIGS / "data" / "hh.yaml")],
        [
            TINY,
            "--policy.path",
            "trainer",
            "--trainer.max_epochs=7",
            "--trainer.logger",
            CSV,
            "--data",
            "PreferenceData",
        ],
        ["--trainer.logger", CSV, "--trainer.logger+", CSV, "--trainer.logger.version=3", f"--trainer.logger+={CSV}"],
        ["--data.max_length=64", "--data", str(CONFIGS / "data" / "hh.yaml"), "--data.max_length", "64"],
        ["--trainer.logger.version=3", "--trainer.logger", "TensorBoardLogger", "--trainer.max_epochs=1"],
        ["--latent.help", "MarginalSpace"],
        ["--callbacks+=LabelFlipNoise", "--callbacks.rate=0.3"],
        ["--callbacks", "null", "--trainer.accelerator", "cpu"],
        ["--latent"],
    ],
    ids=str,
)
def test_right_arguments_pass(arguments: list[str]) -> None:
    check_config_arguments(arguments, takes_groups=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "PreferenceData", "--data.path=mine.jsonl", TINY],
            r"tiny\.yaml after --data\.path, .* replaces data\.",
        ),
        (["--model=IPO", "-c", TINY.removeprefix("--config=")], r"-c: found .* after --model, .* Give -c first\."),
        (["--trainer.max_steps", "3", TINY], r"--config: found .* after --trainer\.max_steps, expected it before, "),
        (["--seed_everything=7", "--config={seed_everything: 1}"], r"after --seed_everything, "),
        ([LABEL_FLIP, TUNING], r"--callbacks: found .*tuning\.yaml after --callbacks\+, "),
        ([TINY, LABEL_FLIP, "--callbacks.rate=0.3", TUNING], r"after --callbacks\.rate, .* replaces callbacks\."),
    ],
    ids=str,
)
def test_file_after_settings_that_it_replaces(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config_arguments(arguments, takes_groups=True)


@pytest.mark.parametrize(
    ("earlier", "later", "name"),
    [
        ("--data.max_length=64", "data/hh.yaml", "data.max_length"),
        ("--data.init_args.max_length=64", "data/hh.yaml", "data.max_length"),
        ("--data.columns.vote=votes", "data/hh.yaml", "data.columns"),
        ("--data.train_pairs=77", "data/synthetic.yaml", "data.train_pairs"),
        ("--trainer.max_epochs=7", "trainer/cpu.yaml", "trainer.max_epochs"),
        ("--latent.num_codes=5", "latent/gumbel.yaml", "latent.num_codes"),
        ("--latent.g.start=0.5", "latent/gumbel.yaml", "latent.g"),
        ("--model.optimizer=torch.optim.SGD", "algorithm/ipo.yaml", "model.optimizer"),
        ("--policy.width=32", "policy/tiny.yaml", "policy.width"),
        ("--trainer.logger.version=3", "logger/csv.yaml", "trainer.logger.version"),
        ("--trainer.logger+=CSVLogger", "logger/csv.yaml", "trainer.logger"),
        ("--trainer.logger+=CSVLogger", "logger/tensorboard.yaml", "trainer.logger"),
    ],
)
def test_group_after_settings_that_it_replaces(earlier: str, later: str, name: str) -> None:
    folder = Path(later).parent.name
    group = {"algorithm": "model", "logger": "trainer.logger"}.get(folder, folder)
    flag = earlier.partition("=")[0]
    message = (
        f"--{group}: found {CONFIGS / later} after {flag}, expected it before, because it replaces {name}. Give --"
    )
    for arguments in ([f"--{group}", str(CONFIGS / later)], [f"--{group}={CONFIGS / later}"]):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}{group} first"):
            check_config_arguments([DEMO, earlier, "--seed_everything=1", *arguments], takes_groups=True)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--data.max_length=64", "--data={max_length: 3}"], "data.max_length"),
        (["--data.max_length=64", "--data", "{init_args: {max_length: 3}}"], "data.max_length"),
        (["--trainer.logger+=CSVLogger", "--trainer.logger=TensorBoardLogger"], "trainer.logger"),
        (["--trainer.logger+", "CSVLogger", "--trainer.logger", "false", f"--trainer.logger+={CSV}"], "trainer.logger"),
        (["--trainer.logger.version=3", "--trainer.logger=[CSVLogger]"], "trainer.logger"),
        (["--trainer.logger+=CSVLogger", "--trainer={logger: true}"], "trainer.logger"),
    ],
    ids=str,
)
def test_value_after_settings_that_it_replaces(arguments: list[str], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"expected it before, because it replaces {re.escape(name)}\. Give --"):
        check_config_arguments(arguments, takes_groups=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ablation/*.yaml")), ids=lambda path: path.stem)
def test_arguments_of_a_grid_pass(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    grid = read_grid(path)
    tuning = [cell for value in (grid.tune.axis.values if grid.tune else ()) for cell in grid.tuning_cells(value)]
    for cell in [*grid.cells(), *tuning]:
        check_config_arguments(cell.arguments, takes_groups=True)


def test_other_commands_have_other_options() -> None:
    check_config_arguments(["--model", "runs/version_0", "--data", "x", "--latent.num_codes", "3"], takes_groups=False)
