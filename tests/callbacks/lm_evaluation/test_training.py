"""Tests that an evaluation leaves the training unchanged, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from lpc_lightning.algorithms import DPO
from lpc_lightning.callbacks import LMEvaluation
from lpc_lightning.policy import LoRA, TinyPolicy
from tests.callbacks.lm_evaluation.conftest import Losses, adam, gumbel, rows


def without_benchmarks(logged: list[dict[str, str]]) -> list[dict[str, str]]:
    kept = [{name: cell for name, cell in row.items() if not name.startswith("lm_eval/")} for row in logged]
    return [row for row in kept if set(row) > {"step"}]


def assert_same(actual: Any, expected: Any) -> None:
    """Check that nested values are equal, bit by bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name in actual:
            assert_same(actual[name], expected[name])
    elif isinstance(actual, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(actual, expected) if isinstance(actual, torch.Tensor) else actual == expected


MODULES: dict[str, Callable[[], DPO]] = {
    "gumbel": lambda: DPO(policy=TinyPolicy(width=16, layers=1, heads=2), optimizer=adam, latent=gumbel()),
    "gumbel, lora with dropout": lambda: DPO(
        policy=TinyPolicy(width=16, layers=1, heads=2, lora=LoRA(rank=4, alpha=8, dropout=0.3)),
        optimizer=adam,
        latent=gumbel(),
        latent_lr=1e-2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", list(MODULES.values()), ids=list(MODULES))
def test_training_is_unchanged(make, fit, task, tmp_path) -> None:
    def save() -> ModelCheckpoint:
        return ModelCheckpoint(filename="{step}", save_top_k=-1, every_n_train_steps=1)

    evaluation = LMEvaluation([task], limit=4, every_n_steps=2, step_limit=2, prior_mode="sample")
    losses = Losses(), Losses()
    epochs = {"max_epochs": 2, "val_check_interval": 4}
    fit("without", losses[0], save(), module=make(), **epochs)
    fit("with", losses[1], evaluation, save(), module=make(), **epochs)
    assert losses[0].values == losses[1].values
    assert len(set(losses[0].values)) == 20
    saved = sorted(path.name for path in (tmp_path / "without" / "checkpoints").iterdir())
    assert len(saved) == 10
    for name in saved:
        expected, actual = (
            torch.load(tmp_path / run / "checkpoints" / name, weights_only=True) for run in ("without", "with")
        )
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
            assert_same(actual[part], expected[part])
    expected, actual = (rows(tmp_path / run) for run in ("without", "with"))
    assert without_benchmarks(actual) == expected
    assert {path.name for path in (tmp_path / "with" / "lm_eval").iterdir()} == {
        "results.json", "items.jsonl", "step_2", "step_4", "step_6", "step_8",
    }  # fmt: skip


def test_random_states_are_restored(fit, task) -> None:
    """Each step sets the seed, so that the previous test does not detect a changed state."""

    class States(Callback):
        def __init__(self) -> None:
            self.values: list[list[int]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.values.append(torch.get_rng_state().tolist())

    before, after = States(), States()
    fit("run", before, LMEvaluation([task], limit=2, every_n_steps=1, step_limit=2), after)
    assert before.values == after.values


class Evaluated(LMEvaluation):
    """Evaluation that stores the weights that it evaluates between steps."""

    def _run(self, trainer: Any, pl_module: Any, limit: Any, folder: Path, name: str) -> Any:
        if folder == Path("step_2"):
            self.weights = {name: weight.detach().clone() for name, weight in pl_module.policy.named_parameters()}
        return super()._run(trainer, pl_module, limit, folder, name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_averaged_weights_are_evaluated(fit: Callable[..., Any], task: str, tmp_path: Path) -> None:
    """A checkpoint holds the average of the weights, and the trained weights beside it."""
    average, evaluation = EMAWeightAveraging(decay=0.9), Evaluated([task], every_n_steps=2, step_limit=2)
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2)
    fit("run", average, evaluation, saver, max_steps=3)
    stored = torch.load(tmp_path / "saved" / "step=2.ckpt", weights_only=True)
    expected, trained = stored["state_dict"], stored["current_model_state"]
    assert any(not torch.equal(expected[name], trained[name]) for name in expected if name.startswith("policy."))
    assert all(torch.equal(weight, expected[f"policy.{name}"]) for name, weight in evaluation.weights.items())
