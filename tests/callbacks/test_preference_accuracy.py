"""The callback in real runs: the module's own headline, its names, and a training that does not notice it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lpc_lightning.algorithms import DPO, SimPO
from lpc_lightning.callbacks import CodebookMonitor, PreferenceAccuracy
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.latent import ExpectedSpace, GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import TinyPolicy

CODES: dict[str, Any] = {"num_codes": 4, "init_logit_std": 2.0}
MODES = {"prior", "posterior", "marginal", "no_latent", "shuffled"}


@pytest.fixture
def data(tmp_path: Path) -> SyntheticPreferences:
    """9 validation pairs in batches of 3, 3 and 3; 7 test pairs."""
    return SyntheticPreferences(
        train_pairs=12, validation_pairs=9, test_pairs=7, batch_size=4, cache_dir=str(tmp_path / "cache")
    )


@pytest.fixture
def make_module(perturb: Callable[..., None]) -> Callable[..., DPO]:
    """A policy that has left its reference."""

    def make(latent: LatentSpace | None, kind: Any = DPO) -> Any:
        module = kind(policy=TinyPolicy(width=16, layers=1, heads=2), latent=latent)
        module.configure_model()
        perturb(module.policy, deviation=0.05)
        if latent is not None:
            perturb(latent, deviation=0.5)
        return module

    return make


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [DPO, SimPO])
def test_the_prior_mode_is_the_modules_headline_to_the_bit(
    precision: Any, kind: Any, data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    module = make_module(GumbelSpace(**CODES), kind)
    trainer = make_trainer(callbacks=[PreferenceAccuracy()], precision=precision)
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        (said,) = run(module, datamodule=data, verbose=False)
        assert said[f"{stage}/accuracy/prior"] == said[f"{stage}/rewards/accuracies"]
        assert said[f"{stage}/margin/prior"] == said[f"{stage}/rewards/margins"]
        assert said[f"{stage}/margin/prior"] != 0
        assert said[f"{stage}/pairs"] == {"val": 9, "test": 7}[stage]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_modes_are_scored_in_the_precision_of_the_step(
    precision: Any, data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    """With a prior mode that ignores the prompt, another pair's z is one's own: the same number, to the last bit."""
    callback = PreferenceAccuracy()
    trainer = make_trainer(callbacks=[callback], precision=precision)
    (said,) = trainer.validate(make_module(MarginalSpace(prior_mode=1, **CODES)), datamodule=data, verbose=False)
    assert [item["margins"]["shuffled"] for item in callback.report.items] == [
        item["margins"]["prior"] for item in callback.report.items
    ]
    assert said["val/margin/no_latent"] != said["val/margin/prior"]


def test_every_mode_is_logged_for_all_pairs_and_for_each_group(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    callback = PreferenceAccuracy()
    trainer = make_trainer(callbacks=[callback])
    (said,) = trainer.validate(make_module(ExpectedSpace(**CODES)), datamodule=data, verbose=False)
    examples = data.generator.examples(9, "validation")
    groups = {f"/source/{example.source}" for example in examples} | {
        f"/factor/{example.factor}" for example in examples
    }
    assert len(groups) > 4
    for group in {""} | groups:
        means = {f"val/{kind}/{mode}{group}" for kind in ("accuracy", "margin") for mode in MODES}
        assert {*means, f"val/pairs{group}", f"val/swap_turnover{group}"} <= set(said)
    ours = {name for name in said if name.split("/")[1] in ("accuracy", "margin", "pairs", "swap_turnover")}
    assert len(ours) == (2 * len(MODES) + 2) * (1 + len(groups))
    assert [item["id"] for item in callback.report.items] == [example.id for example in examples]
    assert [item["source"] for item in callback.report.items] == [example.source for example in examples]
    assert {name.removeprefix("val/"): said[name] for name in ours} == callback.report.metrics


@pytest.mark.parametrize("deciding", ["visible", "hidden"])
def test_the_headline_as_a_share_of_the_best(
    deciding: Any, tmp_path: Path, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    """The best is 1 where the prompt shows the factor, and the generator's own number where annotators are hidden."""
    data = SyntheticPreferences(deciding, validation_pairs=9, test_pairs=7, batch_size=4, cache_dir=str(tmp_path))
    best = data.generator.examples(1)[0].meta["best_accuracy"]
    assert best == 1 if deciding == "visible" else 0.5 < best < 1
    trainer = make_trainer(callbacks=[PreferenceAccuracy()])
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        (said,) = run(make_module(None), datamodule=data, verbose=False)
        assert said[f"{stage}/share_of_best"] == pytest.approx(said[f"{stage}/rewards/accuracies"] / best, abs=1e-9)


def test_data_that_does_not_know_its_best_has_no_share_of_it(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    make_trainer().validate(make_module(None, SimPO), datamodule=data, verbose=False)
    loader, trainer = data.val_dataloader(), make_trainer(callbacks=[PreferenceAccuracy()])
    (said,) = trainer.validate(make_module(None, SimPO), loader, verbose=False)
    assert "val/accuracy/prior" in said
    assert "val/share_of_best" not in said


def test_a_plain_run_has_the_prior_alone(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    (said,) = make_trainer(callbacks=[PreferenceAccuracy(by=[])]).validate(make_module(None), data, verbose=False)
    assert {name for name in said if name.split("/")[1] in ("accuracy", "margin", "pairs", "swap_turnover")} == {
        "val/accuracy/prior", "val/margin/prior", "val/pairs",
    }  # fmt: skip


class Rounds(Callback):
    """What each validation said."""

    def __init__(self) -> None:
        self.said: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.said.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})


def test_the_sanity_check_is_measured_and_leaves_nothing_behind(fitted: Any, tmp_path: Path) -> None:
    """Before training the round is that of two batches; afterwards each round holds the 6 pairs of the data."""
    rounds = Rounds()
    fitted(PreferenceAccuracy(), rounds, num_sanity_val_steps=2, max_epochs=2, enable_checkpointing=False)
    assert [said["val/pairs"] for said in rounds.said] == [4, 6, 6]
    for said in rounds.said:
        assert said["val/accuracy/prior"] == said["val/rewards/accuracies"]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row["val/accuracy/posterior"] for row in csv.DictReader(file)]
    assert sum(bool(row) for row in rows) == 2, "the logger gets the rounds of training alone"


def test_nothing_of_it_stands_in_the_progress_bar(fitted: Any) -> None:
    trainer = fitted(PreferenceAccuracy(), num_sanity_val_steps=0, enable_checkpointing=False)
    assert "val/accuracy/prior" in trainer.callback_metrics
    assert not any("accuracy/" in name for name in trainer.progress_bar_metrics)


def test_training_does_not_notice_the_callbacks(
    data: SyntheticPreferences, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """Weights after Gumbel noise and a validation within and after each epoch, with and without them, bit for bit."""
    weights = []
    for number, callbacks in enumerate(([], [PreferenceAccuracy(), CodebookMonitor(every=1)])):
        module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=GumbelSpace(**CODES))
        settings: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": -1}
        trainer = make_trainer(callbacks=callbacks, default_root_dir=tmp_path / str(number), **settings)
        torch.manual_seed(number)  # what else may have been drawn does not matter
        trainer.fit(module, data)
        assert trainer.global_step == 6
        weights.append(module.state_dict())
    assert len(list(tmp_path.glob("1/codebook/*.png"))) == 4 * 2
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
