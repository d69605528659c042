"""Tests of PreferenceAccuracy in real runs: values, names, and an unchanged training."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lpc_lightning.algorithms import DPO, SimPO
from lpc_lightning.callbacks import CodebookMonitor, LabelFlipNoise, PreferenceAccuracy
from lpc_lightning.data import Columns, PreferenceData, SyntheticPreferences
from lpc_lightning.latent import ExpectedSpace, GumbelSpace, LatentSpace, MarginalSpace
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.robust import REPO

CODES: dict[str, Any] = {"num_codes": 4, "init_logit_std": 2.0}
MODES = {"prior", "posterior", "marginal", "no_latent", "shuffled"}


@pytest.fixture
def data(cache_dir: Path) -> SyntheticPreferences:
    """9 validation pairs in batches of 3, 3 and 3; 7 test pairs."""
    return SyntheticPreferences(
        train_pairs=12, validation_pairs=9, test_pairs=7, batch_size=4, cache_dir=str(cache_dir)
    )


@pytest.fixture
def make_module(perturb: Callable[..., None]) -> Callable[..., DPO]:
    """Function that makes a policy that differs from its reference."""

    def make(latent: LatentSpace | None, kind: Any = DPO) -> Any:
        module = kind(policy=TinyPolicy(width=16, layers=1, heads=2), latent=latent)
        module.configure_model()
        perturb(module.policy, deviation=0.05)
        if latent is not None:
            perturb(latent, deviation=0.5)
        return module

    return make


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("kind", [DPO, SimPO])
def test_prior_mode_is_the_modules_accuracy(
    precision: Any, kind: Any, data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    module = make_module(GumbelSpace(**CODES), kind)
    trainer = make_trainer(callbacks=[PreferenceAccuracy()], precision=precision)
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        (metrics,) = run(module, datamodule=data, verbose=False)
        assert metrics[f"{stage}/accuracy/prior"] == metrics[f"{stage}/rewards/accuracies"]
        assert metrics[f"{stage}/margin/prior"] == metrics[f"{stage}/rewards/margins"]
        assert metrics[f"{stage}/margin/prior"] != 0
        assert metrics[f"{stage}/pairs"] == {"val": 9, "test": 7}[stage]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_modes_use_the_precision_of_the_step(
    precision: Any, data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    """If the prior mode ignores the prompt, the z of another pair is the same: the margins are equal, bit by bit."""
    callback = PreferenceAccuracy()
    trainer = make_trainer(callbacks=[callback], precision=precision)
    (metrics,) = trainer.validate(make_module(MarginalSpace(prior_mode=1, **CODES)), datamodule=data, verbose=False)
    assert [item["margins"]["shuffled"] for item in callback.report.items] == [
        item["margins"]["prior"] for item in callback.report.items
    ]
    assert metrics["val/margin/no_latent"] != metrics["val/margin/prior"]


def test_metrics_of_all_pairs_and_of_groups(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    callback = PreferenceAccuracy()
    trainer = make_trainer(callbacks=[callback])
    (metrics,) = trainer.validate(make_module(ExpectedSpace(**CODES)), datamodule=data, verbose=False)
    examples = data.generator.examples(9, "validation")
    groups = {f"/source/{example.source}" for example in examples} | {
        f"/factor/{example.factor}" for example in examples
    }
    assert len(groups) > 4
    for group in {""} | groups:
        means = {f"val/{kind}/{mode}{group}" for kind in ("accuracy", "margin") for mode in MODES}
        assert {*means, f"val/pairs{group}", f"val/swap_turnover{group}"} <= set(metrics)
    kinds = ("accuracy", "margin", "log_loss", "calibration_error", "pairs", "swap_turnover", "longer_is_chosen")
    logged = {name for name in metrics if name.split("/")[1] in kinds}
    deterministic = len(MODES) - 1  # all modes but `shuffled` have a calibration error
    assert len(logged) == (3 * len(MODES) + 2) * (2 + len(groups)) + deterministic + 2
    assert [item["id"] for item in callback.report.items] == [example.id for example in examples]
    assert [item["source"] for item in callback.report.items] == [example.source for example in examples]
    assert {name.removeprefix("val/"): metrics[name] for name in logged} == callback.report.metrics


@pytest.mark.parametrize("deciding", ["visible", "hidden"])
def test_share_of_best(deciding: Any, tmp_path: Path, make_module: Any, make_trainer: Callable[..., Trainer]) -> None:
    """The best accuracy is 1 if the prompt shows the factor. With hidden annotators, the generator computes it."""
    data = SyntheticPreferences(deciding, validation_pairs=9, test_pairs=7, batch_size=4, cache_dir=str(tmp_path))
    best = data.generator.examples(1)[0].meta["best_accuracy"]
    assert best == 1 if deciding == "visible" else 0.5 < best < 1
    trainer = make_trainer(callbacks=[PreferenceAccuracy()])
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        (metrics,) = run(make_module(None), datamodule=data, verbose=False)
        assert metrics[f"{stage}/share_of_best"] == pytest.approx(
            metrics[f"{stage}/rewards/accuracies"] / best, abs=1e-9
        )


def test_share_of_best_unknown(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    make_trainer().validate(make_module(None, SimPO), datamodule=data, verbose=False)
    loader, trainer = data.val_dataloader(), make_trainer(callbacks=[PreferenceAccuracy()])
    (metrics,) = trainer.validate(make_module(None, SimPO), loader, verbose=False)
    assert "val/accuracy/prior" in metrics
    assert "val/share_of_best" not in metrics


def test_run_without_latent(data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]) -> None:
    (metrics,) = make_trainer(callbacks=[PreferenceAccuracy(by=[])]).validate(make_module(None), data, verbose=False)
    kinds = ("accuracy", "margin", "log_loss", "pairs", "swap_turnover")
    assert {name for name in metrics if name.split("/")[1] in kinds} == {
        f"val/{name}{group}"
        for name in ("accuracy/prior", "margin/prior", "log_loss/prior", "pairs")
        for group in ("", "/length_matched")
    }


class Rounds(Callback):
    """Callback that stores the metrics of each validation."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name})


def test_sanity_check_leaves_no_pairs(fitted: Any, tmp_path: Path) -> None:
    """The sanity check has two batches. Each later round has the 6 pairs of the data."""
    rounds = Rounds()
    fitted(PreferenceAccuracy(), rounds, num_sanity_val_steps=2, max_epochs=2, enable_checkpointing=False)
    assert [metrics["val/pairs"] for metrics in rounds.metrics] == [4, 6, 6]
    for metrics in rounds.metrics:
        assert metrics["val/accuracy/prior"] == metrics["val/rewards/accuracies"]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row["val/accuracy/posterior"] for row in csv.DictReader(file)]
    assert sum(bool(row) for row in rows) == 2, "the sanity check is not logged"


def test_metrics_are_not_in_the_progress_bar(fitted: Any) -> None:
    trainer = fitted(PreferenceAccuracy(), num_sanity_val_steps=0, enable_checkpointing=False)
    assert "val/accuracy/prior" in trainer.callback_metrics
    assert not any("accuracy/" in name for name in trainer.progress_bar_metrics)


@pytest.mark.slow
def test_callbacks_do_not_change_training(
    data: SyntheticPreferences, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """Compare weights bit by bit, with Gumbel noise and a validation within and after each epoch."""
    weights = []
    for number, callbacks in enumerate(([], [PreferenceAccuracy(), CodebookMonitor(every=1)])):
        module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=GumbelSpace(**CODES))
        settings: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 2, "num_sanity_val_steps": -1}
        trainer = make_trainer(callbacks=callbacks, default_root_dir=tmp_path / str(number), **settings)
        torch.manual_seed(number)  # other random numbers must not matter
        trainer.fit(module, data)
        assert trainer.global_step == 6
        weights.append(module.state_dict())
    assert len(list(tmp_path.glob("1/codebook/*.png"))) == 4 * 2
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


def auroc(margins: list[float], wrong: list[bool]) -> float:
    """Compute the share of pairs of a wrong and a right label in which the wrong one has the lower margin."""
    lower = [
        (low < high) + (low == high) / 2
        for low, bad in zip(margins, wrong, strict=True)
        if bad
        for high, other in zip(margins, wrong, strict=True)
        if not other
    ]
    return sum(lower) / len(lower)


def test_wrong_training_labels_are_scored(
    data: SyntheticPreferences, make_module: Any, make_trainer: Any, naive_logps: Any, tmp_path: Path
) -> None:
    """The margins are those of the trained policy on the noisy labels. The reliability adds its log-odds."""
    module = make_module(None)
    module.robust_loss = REPO()
    accuracy = PreferenceAccuracy()
    trainer = make_trainer(callbacks=[accuracy, LabelFlipNoise(0.4, seed=2)], max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    pairs = data.training_pairs[:]
    with torch.no_grad():
        logps = naive_logps(module.policy.causal_lm, pairs).float().view(2, -1)
    ratios = logps - torch.tensor([pair.reference_logps for pair in pairs]).T
    differences = (module.beta * (ratios[0] - ratios[1])).tolist()
    margins = dict(zip([pair.id for pair in pairs], differences, strict=True))
    items = accuracy.training_report.items
    assert sorted(item["id"] for item in items) == sorted(margins)
    for item in items:
        assert item["margins"]["prior"] == pytest.approx(margins[item["id"]], abs=1e-4)
        (eta,) = module.robust_loss.reliabilities([""], torch.device("cpu")).tolist()
        p = 1 / (1 + math.exp(-item["margins"]["prior"]))
        assert item["label_correct"] == pytest.approx(eta * p / (eta * p + (1 - eta) * (1 - p)), abs=1e-5)
    wrong = [item["flipped"] for item in items]
    assert 0 < sum(wrong) < 12
    metrics = trainer.callback_metrics
    expected = auroc([item["margins"]["prior"] for item in items], wrong)
    assert float(metrics["val/training/wrong_label_auroc/prior"]) == pytest.approx(expected, abs=1e-6)
    assert float(metrics["val/training/wrong_label_auroc/label_correct"]) == pytest.approx(expected, abs=0.05)
    right = [(item["margins"]["prior"] > 0) != item["flipped"] for item in items]
    assert float(metrics["val/training/gold_accuracy/prior"]) == pytest.approx(sum(right) / 12, abs=1e-6)


def test_clean_training_labels_are_not_scored(data: Any, make_module: Any, make_trainer: Any) -> None:
    trainer = make_trainer(callbacks=[PreferenceAccuracy()], max_epochs=1)
    trainer.fit(make_module(None), datamodule=data)
    assert not [name for name in trainer.callback_metrics if "training/" in name]
    assert not [name for name in trainer.callback_metrics if "gold_" in name]


def voted_pairs(folder: Path, **columns: str) -> PreferenceData:
    """Return 36 pairs. Gold prefers the answer `rejected` of every third one, in all splits."""
    rows = [
        {
            "id": str(number),
            "split": ("train", "train", "validation")[number // 3 % 3],
            "prompt": f"Name {number}!",
            "chosen": "yes " * (1 + number % 4),
            "rejected": "no no",
            "meta": {"gold": "rejected" if number % 3 == 0 else "chosen"},
        }
        for number in range(36)
    ]
    (folder / "votes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits: dict[str, Any] = {"validation_split": "validation", "validation_share": 0.0, "test_split": None}
    return PreferenceData(
        str(folder / "votes.jsonl"),
        columns=Columns(gold="meta.gold", **columns),
        cache_dir=str(folder),
        batch_size=4,
        **splits,
    )


def test_right_labels_are_scored_against_gold(make_module: Any, make_trainer: Any, tmp_path: Path) -> None:
    """Training on gold: no label is wrong, and every metric against gold is there, equal to that of the labels."""
    accuracy = PreferenceAccuracy()
    trainer = make_trainer(callbacks=[accuracy], max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(make_module(None), datamodule=voted_pairs(tmp_path, vote="meta.gold"))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    of_gold = {name: value for name, value in metrics.items() if "gold_" in name and "training/" not in name}
    measures = ("accuracy/prior", "log_loss/prior", "calibration_error/prior", "longer_is_chosen")
    assert {f"val/gold_{measure}" for measure in measures} <= set(of_gold)
    assert "val/gold_accuracy/prior/length_matched" in of_gold
    assert of_gold == {name: metrics[name.replace("gold_", "")] for name in of_gold}
    right = [item["margins"]["prior"] > 0 for item in accuracy.training_report.items]
    assert metrics["val/training/gold_accuracy/prior"] == pytest.approx(sum(right) / 24)
    assert not [name for name in metrics if "wrong_label" in name or "flipped" in name]


@pytest.mark.parametrize("marker", [None, "[FLIP]"])
def test_votes_are_scored_against_gold(marker: str | None, make_module: Any, make_trainer: Any, tmp_path: Path) -> None:
    """Every third label is wrong in all splits. Noise flips further training labels, right ones and wrong ones."""
    data = voted_pairs(tmp_path)
    accuracy, noise = PreferenceAccuracy(), LabelFlipNoise(0.3, seed=4, marker=marker)
    trainer = make_trainer(callbacks=[accuracy, noise], max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(make_module(None), datamodule=data)
    items, metrics = accuracy.report.items, trainer.callback_metrics
    assert sum(item["flipped"] for item in items) == 4
    assert len(items) == 12
    right = [(item["margins"]["prior"] > 0) != item["flipped"] for item in items]
    assert float(metrics["val/gold_accuracy/prior"]) == pytest.approx(sum(right) / 12, abs=1e-6)
    longer = []
    for item in items:
        chosen, rejected = item["tokens"]
        share = 1.0 if chosen > rejected else 0.0 if chosen < rejected else 0.5
        longer.append(1 - share if item["flipped"] else share)
    assert float(metrics["val/gold_longer_is_chosen"]) == pytest.approx(sum(longer) / 12, abs=1e-6)
    record = json.loads((tmp_path / "label_noise.json").read_text())
    flips = set(record["ids"])
    assert 0 < len(flips) < 24
    wrong = {item["id"] for item in accuracy.training_report.items if item["flipped"]}
    assert wrong == {str(number) for number in range(0, 36, 3) if number // 3 % 3 != 2} ^ flips
    assert "val/training/wrong_label_auroc/prior" in metrics
