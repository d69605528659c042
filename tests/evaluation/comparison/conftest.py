"""Fixtures of tests of `lpc-lightning evaluate`: a checkpoint, a plain model, the command and its results."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lpc_lightning.evaluation.benchmarks.runner
import lpc_lightning.evaluation.comparison.one_model
from lpc_lightning.cli import main
from lpc_lightning.evaluation.benchmarks.results import read_results
from lpc_lightning.evaluation.benchmarks.runner import run_benchmarks
from tests.fixtures.commands import Command, Outcome, run_command


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a fit of three steps, with three different codes."""
    folder = tmp_path_factory.mktemp("fit")
    flags = "--policy=TinyPolicy --policy.width=16 --policy.layers=1 --policy.heads=2 --model=DPO --model.beta=1 "
    flags += (
        "--model.optimizer=torch.optim.AdamW --model.optimizer.lr=0.03 --latent=MarginalSpace --latent.num_codes=3 "
    )
    flags += "--latent.init_logit_std=2 --data=SyntheticPreferences --data.train_pairs=6 --data.validation_pairs=2 "
    flags += "--trainer.accelerator=cpu --trainer.precision=32-true --trainer.enable_progress_bar=false "
    flags += f"--trainer.max_steps=3 --trainer.log_every_n_steps=1 --data.batch_size=2 --data.cache_dir={folder} "
    flags += f"--trainer.default_root_dir={folder / 'runs'} --trainer.enable_model_summary=false"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lpc-lightning"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        main(["fit", *flags.split()])
    (path,) = folder.glob("runs/version_0/checkpoints/*.ckpt")
    return path.rename(path.with_name("last.ckpt"))


@pytest.fixture
def checkpoint(fitted: Path, tmp_path: Path) -> Path:
    """Copy of the checkpoint in a separate run folder."""
    path = tmp_path / "runs" / "lpc" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    return Path(shutil.copy2(fitted, path))


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
