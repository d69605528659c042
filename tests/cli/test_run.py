"""Tests of a fit by the command: its folder, its logs, its saved config, and its groups of settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.fixtures.commands import CONFIGS, DATA, MODEL, POLICY, TRAINER, Command, logged


@pytest.mark.slow
def test_each_run_writes_its_own_folder(fit: Command, runs: Path) -> None:
    assert fit().code == 0
    assert fit("--seed_everything=5").code == 0
    assert sorted(path.name for path in runs.iterdir()) == ["version_0", "version_1"]
    for run in runs.iterdir():
        assert (run / "config.yaml").is_file()
        assert len(list(run.glob("checkpoints/*.ckpt"))) == 1
        columns = logged(run)
        assert len(columns["train/loss"]) == 6
        assert len(columns["val/loss"]) == 2
        assert columns["data/train/read"] == columns["data/train/kept"] == [6]
        assert columns["data/validation/kept"] == [3]
        board = EventAccumulator(str(run)).Reload()
        scalars = [event.value for event in board.Scalars("train/loss")]
        assert scalars == pytest.approx(columns["train/loss"], rel=1e-6)
    assert logged(runs / "version_0")["train/loss"] != logged(runs / "version_1")["train/loss"]


@pytest.mark.slow
def test_run_without_checkpoints_keeps_the_rest(fit: Command, runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    default = f"--callbacks={CONFIGS / 'callbacks' / 'default.yaml'}"
    output = fit("--trainer.enable_checkpointing=false", "--trainer.max_epochs=1", default)
    assert output.code == 0, output.err
    assert (runs / "version_0" / "summary.json").is_file()
    assert not list(runs.glob("**/*.ckpt"))
    assert "callbacks: found none. " not in caplog.text


@pytest.mark.slow
def test_run_without_logger_has_its_own_folder(fit: Command, runs: Path) -> None:
    for _ in range(2):
        output = fit("--trainer.logger=false", f"--callbacks={CONFIGS / 'callbacks' / 'default.yaml'}")
        assert output.code == 0, output.err
    assert f"Run folder: {runs / 'version_1'}\n" in output.out
    for number in range(2):
        names = {path.name for path in (runs / f"version_{number}").iterdir()}
        assert names >= {"config.yaml", "summary.json", "checkpoints"}
        assert "metrics.csv" not in names
        assert not [name for name in names if name.startswith("events")]
    assert {path.name for path in runs.iterdir()} == {"version_0", "version_1"}


def test_loggers_receive_the_settings(fit: Command, runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the loggers of a file: rows and hyperparameters, and no events."""
    output = fit(f"--trainer.logger={CONFIGS / 'logger' / 'csv.yaml'}", "--trainer.max_epochs=1")
    assert output.code == 0, output.err
    assert "callbacks: found none. " in caplog.text
    run = runs / "version_0"
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.yaml", "hparams.yaml", "metrics.csv", "rendered_pair.txt",
    }  # fmt: skip
    stated, saved = (yaml.safe_load((run / name).read_text()) for name in ("hparams.yaml", "config.yaml"))
    assert stated["run_folder"] == str(run)
    assert stated["data"] == saved["data"]
    assert stated["trainer"]["max_epochs"] == 1
    assert stated["seed_everything"] == 4
    assert stated["latent"]["init_args"]["num_codes"] == 3


@pytest.mark.slow
def test_fast_dev_run_leaves_nothing(fit: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Path) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    callbacks = [f"--callbacks={CONFIGS / 'callbacks' / 'default.yaml'}", "--callbacks+=LabelFlipNoise"]
    assert fit("--trainer.fast_dev_run=2", *callbacks, "--callbacks.rate=0.5").code == 0
    assert list(Path().iterdir()) == []
    assert not runs.exists()


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize(("width", "set_by_user", "threads"), [(64, False, 1), (64, True, 2), (68, False, 2)])
def test_a_narrow_policy_takes_one_thread(
    width: int, set_by_user: bool, threads: int, fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2") if set_by_user else monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert fit("--trainer.fast_dev_run=1", f"--policy.width={width}").code == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_failed_run_leaves_no_empty_folder(fit: Command, runs: Path) -> None:
    assert fit("--data.layout=PaddedLayout", "--data.batch_size=0").code != 0
    assert not runs.exists() or list(runs.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "callbacks", [[], [f"--callbacks={CONFIGS / 'callbacks' / 'default.yaml'}"]], ids=["", "callbacks"]
)
def test_run_repeats_from_its_saved_config(callbacks: list[str], command: Command, fit: Command, runs: Path) -> None:
    assert fit(*callbacks).code == 0
    first = logged(runs / "version_0")
    output = command("fit", f"--config={runs / 'version_0' / 'config.yaml'}")
    assert output.code == 0, output.err
    assert logged(runs / "version_0") == first
    again = logged(runs / "version_1")
    assert {
        "train/loss",
        "val/loss",
        *(["lr-AdamW/backbone", "resources/pairs_per_second"] if callbacks else []),
    } <= set(first)
    assert set(again) == set(first)
    for name in [name for name in first if not name.startswith("resources/")]:
        assert again[name] == first[name], name
    one, other = ((runs / f"version_{number}" / "config.yaml").read_text() for number in (0, 1))
    assert one == other


def test_a_config_file_and_flags_make_one_run(command: Command, places: list[str], runs: Path, tmp_path: Path) -> None:
    """Groups from files of their own, relative to the file that names them, and a flag that wins over both."""
    group = {"class_path": "lpc_lightning.latent.MarginalSpace", "init_args": {"num_codes": 5, "hidden": 8}}
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "latent.yaml").write_text(yaml.safe_dump(group))
    (tmp_path / "run.yaml").write_text("latent: parts/latent.yaml\n")
    flags = [*POLICY, *MODEL, *DATA, *TRAINER, *places, "--trainer.max_steps=1", "--latent.num_codes=4"]
    assert command("fit", f"--config={tmp_path / 'run.yaml'}", *flags).code == 0
    (path,) = (runs / "version_0").glob("checkpoints/*.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"]["latent.codebook.weight"].shape == (4, 16)
