"""Fixtures of tests of `lpc-lightning evaluate`: a checkpoint, a plain model, the command and its results."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lpc_lightning.evaluation.benchmarks.runner
import lpc_lightning.evaluation.comparison.one_model
from lpc_lightning.evaluation.benchmarks.results import read_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from tests.fixtures.commands import Command, Outcome, checkpoint_of, run_command

LATENT = ["--latent=MarginalSpace", "--latent.num_codes=3", "--latent.init_logit_std=2"]


@pytest.fixture
def checkpoint(tiny_fit: Callable[..., Path], tmp_path: Path) -> Path:
    """Copy of the checkpoint of three steps with three different codes, in a separate run folder."""
    run = tiny_fit("--model.beta=1", "--model.optimizer.lr=0.03", "--trainer.max_steps=3", *LATENT)
    path = tmp_path / "runs" / "lpc" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    return Path(shutil.copy2(checkpoint_of(run), path))


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, loud_policy: Any) -> str:
    """Folder of a model without a latent."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    policy, tokenizer = loud_policy
    policy.causal_lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], data_dir: Path, tmp_path: Path) -> Command:
    """Function that runs the command with local data and float32. Its results are in `results`."""
    fixed = [f"--data-dir={data_dir}", f"--output={tmp_path / 'results'}", "--precision=float32", "--batch-size=4"]

    def run(*arguments: Any) -> Outcome:
        return run_command(capsys, "evaluate", *fixed, *arguments)

    return run


@pytest.fixture
def results(tmp_path: Path) -> Callable[[str], Any]:
    return lambda name: read_results(tmp_path / "results" / name)


@pytest.fixture
def run_tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks that were run. New names are appended during the test."""
    names: list[str] = []

    def recording_run(lm: Any, tasks: Any, **settings: Any) -> Any:
        names.extend(tasks)
        return run_benchmarks(lm, tasks, **settings)

    monkeypatch.setattr(lpc_lightning.evaluation.benchmarks.runner, "run_benchmarks", recording_run)
    return names


@pytest.fixture
def no_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*arguments: Any, **settings: Any) -> None:
            raise AssertionError("a model was opened")

        monkeypatch.setattr(lpc_lightning.evaluation.comparison.one_model, "open_policy", refuse)
        monkeypatch.setattr(lpc_lightning.evaluation.comparison.one_model, "open_module", refuse)

    return forbid
