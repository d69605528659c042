"""Tests of SIGTERM, sent to the process of a real run."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from lpc_lightning.callbacks import GracefulStop
from tests.fixtures.processes import ForkedProcess, forked_command

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[2] / "configs" / "callbacks" / "default.yaml"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Command of a run of a tiny policy with 60 micro-batches, 3 in a step."""
    flags = {
        "model": "DPO",
        "model.optimizer.lr": "1e-3",
        "latent": "GumbelSpace",
        "latent.num_codes": "4",
        "policy": "TinyPolicy",
        "policy.width": "16",
        "policy.layers": "1",
        "policy.heads": "2",
        "data": "SyntheticPreferences",
        "data.train_pairs": "120",
        "data.validation_pairs": "4",
        "data.batch_size": "2",
        "data.cache_dir": str(tmp_path / "cache"),
        "callbacks": str(CONFIG),
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_epochs": "1",
        "trainer.accumulate_grad_batches": "3",
        "trainer.log_every_n_steps": "1",
        "trainer.default_root_dir": str(tmp_path / "runs"),
    }
    return ["fit", *(f"--{name}={value}" for name, value in flags.items())]


def finished(command: list[str], log: Path) -> str:
    """Run a command, and return its output."""
    process = forked_command(*command, log=log)
    assert process.wait() == 0, process.errors
    return log.read_text()


def wait_until(happened: Callable[[], bool], process: ForkedProcess) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.is_running, process.errors
        assert time.monotonic() < deadline
        time.sleep(0.01)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_sigterm_then_resume_equals_a_whole_run(command: list[str], tmp_path: Path) -> None:
    whole, stopped, resumed = (tmp_path / "runs" / f"version_{number}" for number in range(3))
    finished(command, tmp_path / "whole.log")

    process = forked_command(*command, log=tmp_path / "stopped.log")
    metrics = stopped / "metrics.csv"
    wait_until(lambda: metrics.is_file() and "train/loss" in metrics.read_text(), process)
    process.terminate()
    assert process.wait() == 143, process.errors
    output = process.output.read_text() + process.errors
    checkpoint = stopped / "checkpoints" / "stopped.ckpt"
    assert f"--ckpt_path {checkpoint}" in output
    assert "Traceback" not in output
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < steps < 20

    resume = [*command, f"--ckpt_path={checkpoint}"]
    assert "flags and config files do not change them" in finished(resume, tmp_path / "resumed.log")
    expected, actual = final_weights(whole), final_weights(resumed)
    assert set(actual) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_sigterm_in_the_warm_start(command: list[str], tmp_path: Path) -> None:
    slow = [*command, "--data.train_pairs=1024", "--latent.warm_start_pairs=1024"]
    process = forked_command(*slow, log=tmp_path / "log")

    def output() -> str:
        return process.output.read_text() + process.errors

    wait_until(lambda: "warm start:" in output(), process)
    process.terminate()
    sent = time.monotonic()
    assert process.wait() == 143, output()
    assert time.monotonic() - sent < 30
    assert "held-out pairs" not in output(), "the warm start was over before the signal"
    assert "Traceback" not in output()
    assert not (tmp_path / "runs" / "version_0" / "checkpoints" / "stopped.ckpt").exists()


def test_fit_in_another_thread_installs_no_handler(fitted: Callable[..., Trainer]) -> None:
    """Python allows signal handlers in the main thread alone. Lightning's own are left out there as well."""
    steps: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    fit = threading.Thread(target=lambda: steps.append(fitted(GracefulStop(), max_steps=1).global_step))
    fit.start()
    fit.join()
    assert steps == [1]
    assert signal.getsignal(signal.SIGTERM) is before
