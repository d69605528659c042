"""Tests of shared rows: runs with the same policy and the same texts share them, whatever the labels."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lpc_lightning.algorithms import DPO, IPO, SimPO
from lpc_lightning.callbacks import LabelFlipNoise
from lpc_lightning.latent import GumbelSpace, MarginalSpace, MLPSpace
from lpc_lightning.policy import LoRA


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


@pytest.fixture
def warm_started(
    small_policy: Any, small_data: Any, fit_run: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> Callable[..., tuple[int, int]]:
    """Return a function that runs on the test's own cache and returns the numbers of pairs and of reused pairs."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    logging.getLogger("lightning.pytorch").propagate = True
    data = partial(small_data, cache_dir=str(tmp_path))

    def run(algorithm: Any = DPO, latent: Any = None, warm_start_pairs: int = 12, **options: Any) -> tuple[int, int]:
        policy = small_policy(**options.pop("policy", {}))
        latent = latent or MarginalSpace(num_codes=3, hidden=8)
        latent.warm_start_pairs = warm_start_pairs
        caplog.clear()
        options = {"max_epochs": 1, "default_root_dir": tmp_path} | options
        fit_run(algorithm(policy=policy, latent=latent, optimizer=adam), data(), **options)
        matches = {
            re.match(r"warm start: (\d+) training pairs \((\d+) reused\)", record.message) for record in caplog.records
        }
        (line,) = matches - {None}
        return int(line[1]), int(line[2])

    return run


@pytest.fixture(scope="module")
def filled(small_policy: Any, small_data: Any, fit_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cache with the rows of all 21 pairs, from a run on an empty one."""
    cache = tmp_path_factory.mktemp("filled")
    latent = MarginalSpace(num_codes=3, hidden=8, warm_start_pairs=21)
    module = DPO(policy=small_policy(), latent=latent, optimizer=adam)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PL_GLOBAL_SEED", "0")
        fit_run(module, small_data(cache_dir=str(cache)), max_epochs=1, default_root_dir=cache)
    return cache


SAME: dict[str, dict[str, Any]] = {
    "algorithm": {"algorithm": SimPO},
    "another with a reference": {"algorithm": IPO},
    "latent": {"latent": GumbelSpace(num_codes=2, hidden=4)},
    "no codes": {"latent": MLPSpace(hidden=8)},
    "labels": {"callbacks": [LabelFlipNoise(0.5)]},
    "seed": {"seed": 2, "warm_start_pairs": 21},
    "an untrained adapter": {"policy": {"lora": LoRA(rank=2)}, "seed": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", SAME)
def test_rows_shared_when_unaffected(
    change: str, warm_started: Callable[..., tuple[int, int]], filled: Path, tmp_path: Path
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    assert warm_started(**({"warm_start_pairs": 21} | SAME[change])) == (21, 21)


OTHER: dict[str, dict[str, Any]] = {
    "weights": {"policy": {"seed": 5}},
    "precision": {"precision": "64-true"},
    "marked prompts": {"callbacks": [LabelFlipNoise(0.5, marker="[FLIP]")]},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", OTHER)
def test_rows_not_shared_when_affected(
    change: str, warm_started: Callable[..., tuple[int, int]], filled: Path, tmp_path: Path
) -> None:
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    assert warm_started(**OTHER[change]) == (12, 0)


@pytest.mark.slow
def test_rows_of_missing_pairs_are_added(warm_started: Callable[..., tuple[int, int]]) -> None:
    assert warm_started(warm_start_pairs=8) == (8, 0)
    assert warm_started(warm_start_pairs=21) == (21, 8)
    assert warm_started(warm_start_pairs=13, seed=7) == (13, 13)


@pytest.mark.slow
def test_run_with_cached_rows_is_identical(small_policy: Any, small_data: Any, fit_run: Any, tmp_path: Path) -> None:
    def run(cache: str) -> Any:
        latent = MarginalSpace(num_codes=3, hidden=8, warm_start_pairs=16)
        module = DPO(policy=small_policy(), latent=latent, optimizer=adam)
        data, noise = small_data(cache_dir=str(tmp_path / cache)), [LabelFlipNoise(0.3)]
        return fit_run(module, data, callbacks=noise, max_steps=8, default_root_dir=tmp_path)

    first, again, elsewhere = run("one"), run("one"), run("two")
    for other in (again, elsewhere):
        assert all(torch.equal(weight, other.weights[name]) for name, weight in first.weights.items())


def test_rows_of_trained_adapter_are_separate(small_policy: Any, small_data: Any, fit_run: Any) -> None:
    """The adapter's dropout does not affect the stored rows either."""
    codebooks = []

    class Start(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 0:
                codebooks.append(pl_module.latent.codebook.weight.detach().clone())

    def make() -> DPO:
        latent = MarginalSpace(num_codes=3, hidden=8, warm_start_pairs=16)
        return DPO(policy=small_policy(lora=LoRA(rank=2, dropout=0.5)), latent=latent, optimizer=adam)

    for module, fits in ((make(), 2), (make(), 1)):
        for _ in range(fits):
            fit_run(module, small_data(), callbacks=[Start()], max_steps=8)
        assert module.policy.training
    first, trained, again = codebooks
    assert not torch.allclose(first, trained)
    assert torch.equal(first, again)
