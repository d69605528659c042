"""Tests of the lines on settings that the parser refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fixtures.commands import MODEL, POLICY, Command

LORA = ["--policy.lora=LoRA"]
TEMPERATURE = ["--latent=GumbelSpace", "--latent.tau=Cosine"]
STOPPING = ["--callbacks+=lightning.pytorch.callbacks.EarlyStopping"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--model.betta=0.2"], "model.betta: DPO has no setting betta, did you mean beta?"),
        (["--model.loss_type=ipo"], "model.loss_type: DPO has no setting loss_type, expected one of beta, reference, "),
        (["--policy.lora.r=8"], "policy.lora.r: LoRA has no setting r, expected one of rank, alpha, dropout, target_m"),
        (["--policy.x.y=3"], "policy.x.y: TinyPolicy has no setting x.y, expected one of family, width, "),
        ([*TEMPERATURE, "--latent.tau.stop=1"], "latent.tau.stop: Cosine has no setting stop, expected one of start, "),
        (["--model.optimizer.lrr=1"], "model.optimizer.lrr: AdamW has no setting lrr, did you mean lr?"),
        (
            ["--model.optimizer.learning=1"],
            "model.optimizer.learning: AdamW has no setting learning, expected one of lr",
        ),
        (["--model.optimizer.param=1"], "model.optimizer.param: AdamW has no setting param, expected one of lr, "),
        (
            [*STOPPING, "--callbacks.monitr=x"],
            "callbacks.monitr: EarlyStopping has no setting monitr, did you mean mon",
        ),
        (["--trainer.loger=x"], "--trainer.loger: found no such setting, did you mean --trainer.logger?"),
        (["--polcy.width=3"], "--polcy.width: found no such setting, did you mean --policy.width?"),
        (["--nothing"], "--nothing: found no such setting. `lpc-lightning fit --help` lists the settings."),
        (["tiny.yaml"], "found tiny.yaml without a setting, expected its name before it, as in `--config tiny.yaml`."),
        (
            ["--data=PreferenceData", "--data.path=x", "--data.columns.label_a=L"],
            "data.columns.label_a: found L, expected one of a list, as in [L], null.",
        ),
        (["--model.beta=high"], "model.beta: found high, expected a number."),
        (["--model.optimizer.lr=fast"], "model.optimizer.lr: found fast, expected a number."),
        (["--policy.dtype=fp16"], "policy.dtype: found fp16, expected one of float32, bfloat16, float16, float64."),
        (["--policy.compile=maybe"], "policy.compile: found maybe, expected one of auto, true, false."),
        ([*LORA, "--policy.lora.rank=x"], "policy.lora.rank: found x, expected an integer."),
        (["--trainer.max_epochs=x"], "trainer.max_epochs: found x, expected one of an integer, null."),
        (
            ["--policy=PretrainedPolicy"],
            "policy: found no path for PretrainedPolicy, expected `--policy.path` with a v",
        ),
        (
            ["--latent=no_such.Space"],
            "latent: found no_such.Space, which cannot be imported (No module named 'no_such'",
        ),
        (
            ["--model.optimizer=adamw"],
            "model.optimizer: found adamw, expected a file, or the import path of a class (`t",
        ),
        (
            ["--trainer.logger=wandb"],
            "trainer.logger: found wandb, expected a file (configs/logger/), true, false, CSV",
        ),
        (["--trainer.plugins=nonsense"], "trainer.plugins: found nonsense, expected a file, "),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refused_setting_is_one_line(command: Command, flags: list[str], error: str, tmp_path: Path) -> None:
    output = command("fit", *POLICY, *MODEL, f"--trainer.default_root_dir={tmp_path}", *flags)
    assert output.code == 1
    assert output.err.splitlines() == output.err.splitlines()[:1]
    assert output.err.startswith(f"error: {error}")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("trainer: {loger: x}", "trainer.loger: found no such setting, did you mean trainer.logger?"),
        ("polcy: {width: 3}", "polcy.width: found no such setting, did you mean policy.width?"),
        ("policy: {class_path: TinyPolicy, init_args: {wdth: 3}}", "policy.wdth: TinyPolicy has no setting wdth, did"),
    ],
)
def test_unknown_name_in_a_file_is_one_line(command: Command, content: str, error: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content + "\n")
    (line,) = command("fit", f"--config={path}", *POLICY, *MODEL).err.splitlines()
    assert line.startswith(f"error: {error}")


class Rprop(torch.optim.Rprop):
    """Optimizer with the name of another one, as bitsandbytes has them."""


def test_name_of_several_optimizers(command: Command) -> None:
    output = command("fit", *POLICY, "--model=DPO", "--model.optimizer=Rprop")
    (error,) = output.errors
    assert error.startswith("model.optimizer: found Rprop, the name of several classes, expected one of torch.optim.")
    assert f"{__name__}.Rprop" in error


def test_fit_without_settings_names_them(command: Command) -> None:
    output = command("fit")
    assert output.code == 1
    assert output.errors == [
        "data, model: found none, expected values or a file with them: `--config configs/experiment/tiny.yaml`."
    ]
