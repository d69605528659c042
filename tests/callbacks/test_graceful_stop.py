"""Tests of SIGTERM, sent to the process of a real run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

# The tensors are small, so that a second thread would only cost time.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
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
    return [sys.executable, "-m", "lpc_lightning", "fit", *(f"--{name}={value}" for name, value in flags.items())]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_sigterm_then_resume_equals_a_whole_run(command: list[str], tmp_path: Path) -> None:
    whole, stopped, resumed = (tmp_path / "runs" / f"version_{number}" for number in range(3))
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    metrics = stopped / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and "train/loss" in metrics.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    checkpoint = stopped / "checkpoints" / "stopped.ckpt"
    assert f"--ckpt_path {checkpoint}" in output
    assert "Traceback" not in output
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < steps < 20

    resume = [*command, f"--ckpt_path={checkpoint}"]
    finished = subprocess.run(resume, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert "flags and config files do not change them" in finished.stdout
    expected, actual = final_weights(whole), final_weights(resumed)
    assert set(actual) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(actual[name], weight), name


def test_sigterm_in_the_warm_start(command: list[str], tmp_path: Path) -> None:
    slow = [*command, "--data.train_pairs=4096", "--latent.warm_start_pairs=4096"]
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    assert process.stdout is not None
    output = ""
    while "warm start:" not in output:
        output += (character := process.stdout.read(1))
        assert character, output
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    output += process.communicate(timeout=120)[0]
    assert process.returncode == 143, output
    assert time.monotonic() - sent < 30
    assert "held-out pairs" not in output, "the warm start was over before the signal"
    assert "Traceback" not in output
    assert not (tmp_path / "runs" / "version_0" / "checkpoints" / "stopped.ckpt").exists()
