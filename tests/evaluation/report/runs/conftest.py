"""Fixture: runs of `fit` and `test`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from lpc_lightning.cli import main
from tests.fixtures.commands import PLAIN, places_in


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of three real runs: DPO, DPO with three codes, and a test of the second checkpoint."""
    folder = tmp_path_factory.mktemp("fits")
    flags = [*PLAIN, "--data.validation_pairs=2", "--data.test_pairs=2", "--trainer.max_steps=3", "--seed_everything=3"]
    flags += places_in(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setenv("PL_SEED_WORKERS", "0")
        main(["fit", *flags])
        summary = [
            "--callbacks+=lpc_lightning.callbacks.ResourceMonitor",
            "--callbacks+=lpc_lightning.callbacks.RunSummary",
        ]
        main(["fit", *flags, "--latent=MarginalSpace", "--latent.num_codes=3", *summary])
        (checkpoint,) = folder.glob("runs/version_1/checkpoints/*.ckpt")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The dirpath has changed")
            main(["test", *flags, f"--ckpt_path={checkpoint}"])
        yield folder / "runs"
