"""The callback in real runs: against the module asked again pair by pair, in every space, and its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lpc_lightning.algorithms import DPO, IPO
from lpc_lightning.callbacks import AnnotatorAdaptation, PreferenceAccuracy
from lpc_lightning.data import SyntheticPreferences
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.adaptation.inference import CodeTables, code_weights
from lpc_lightning.evaluation.adaptation.scores import adaptation_scores
from lpc_lightning.latent import ExpectedSpace, GaussianSpace, GumbelSpace, LatentSpace, MarginalSpace, MLPSpace
from lpc_lightning.policy import TinyPolicy

CODES: dict[str, Any] = {"num_codes": 4, "init_logit_std": 2.0}


@pytest.fixture(autouse=True)
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where trainers without a logger leave the files."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> SyntheticPreferences:
    """14 validation pairs of 2 annotators in batches of 4, 4, 4 and 2; 9 test pairs."""
    return SyntheticPreferences(
        "hidden",
        train_pairs=8,
        validation_pairs=14,
        test_pairs=9,
        annotators=2,
        batch_size=4,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def make_module(perturb: Callable[..., None]) -> Callable[..., DPO | IPO]:
    """A policy that has left its reference, with codes that matter."""

    def make(latent: LatentSpace | None, kind: type[DPO | IPO] = DPO) -> DPO | IPO:
        module = kind(policy=TinyPolicy(width=16, layers=1, heads=2), latent=latent, beta=1.0, reference="live")
        module.configure_model()
        perturb(module.policy, deviation=0.05)
        if latent is not None:
            perturb(latent, deviation=0.5)
        return module

    return make


def few_shot(said: Any) -> dict[str, float]:
    """The callback's own metrics."""
    return {name.partition("adaptation/")[2]: value for name, value in said.items() if "adaptation/" in name}


@pytest.mark.parametrize("kind", [DPO, IPO])
@pytest.mark.parametrize("latent", [MarginalSpace(**CODES), ExpectedSpace(**CODES), GumbelSpace(**CODES)])
def test_against_the_module_asked_again(
    latent: LatentSpace,
    kind: type[DPO | IPO],
    data: SyntheticPreferences,
    make_module: Any,
    make_trainer: Callable[..., Trainer],
) -> None:
    """Every pair alone, code after code, the swapped pair as a pair of its own: then the arithmetic that is tested."""
    module, callback = make_module(latent, kind), AnnotatorAdaptation(shots=[0, 1, 3], rounds=4, seed=7)
    trainer = make_trainer(callbacks=[callback])
    (said,) = trainer.validate(module, data, verbose=False)
    tables, ids, annotators = tables_of(module, data)
    expected = adaptation_scores(tables, ids, annotators, (0, 1, 3), rounds=4, seed=7)
    assert set(expected) == ({"exact"} if isinstance(latent, MarginalSpace) else {"exact", "amortised"})
    found = few_shot(said)
    assert set(found) == {f"{kind}/{n}" for kind in expected for n in (0, 1, 3)} | {"prior", "no_latent", "ceiling"}
    for kind, scores in expected.items():
        for n, score in scores.items():
            assert found[f"{kind}/{n}"] == pytest.approx(score.accuracy, abs=1e-9)
    for name, weights in code_weights(tables, annotators).items():
        assert callback.report.weights[name] == pytest.approx(weights, abs=1e-3)
    assert found["ceiling"] == 1


@torch.no_grad()
def tables_of(module: Any, data: SyntheticPreferences) -> tuple[CodeTables, list[str], list[str]]:
    """By the pairs' names, one pair at a time."""
    layout, space, columns = data.make_layout(), module.latent, []
    pairs = sorted(data.pairs["validation"], key=lambda pair: pair.id)
    for pair in pairs:
        rows = []
        for labelled in (pair, pair.swapped()):
            batch = layout([labelled])
            reading, score = module.read(batch)
            nats = 4.0 if isinstance(module, IPO) else 1.0  # its loss is 1/4 at a margin of 0, with beta = 1
            losses = [nats * score.under(code[None])[0].losses for code in space.codebook.weight]
            rows.append(torch.cat(losses))
            if labelled is pair:
                prior = space.log_prior(reading.states.prompt)[0]
                posterior = space.log_posterior(reading.states, score)[0]
        columns.append((prior, *rows, posterior))
    tables = [torch.stack(values).double().numpy() for values in zip(*columns, strict=True)]
    learned = None if isinstance(space, MarginalSpace) else tables[3]
    return CodeTables(*tables[:3], learned), [pair.id for pair in pairs], [pair.annotator for pair in pairs]


def test_none_given_is_the_marginal_accuracy_to_the_bit(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    module = make_module(MarginalSpace(**CODES))
    trainer = make_trainer(callbacks=[AnnotatorAdaptation(), PreferenceAccuracy()])
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        (said,) = run(module, datamodule=data, verbose=False)
        assert said[f"{stage}/adaptation/exact/0"] == said[f"{stage}/accuracy/marginal"]
        assert said[f"{stage}/adaptation/prior"] == said[f"{stage}/rewards/accuracies"]
        assert said[f"{stage}/adaptation/no_latent"] == said[f"{stage}/accuracy/no_latent"]


@pytest.mark.parametrize("batch_size", [1, 3, 14])
def test_batches_do_not_matter(
    batch_size: int, data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    module, found = make_module(ExpectedSpace(**CODES)), []
    for data.eval_batch_size in (4, batch_size):
        (said,) = make_trainer(callbacks=[AnnotatorAdaptation(shots=[0, 2])]).validate(module, data, verbose=False)
        found.append(few_shot(said))
    assert found[0] == pytest.approx(found[1], abs=1e-9)


@pytest.mark.parametrize("latent", [None, MLPSpace(hidden=4), GaussianSpace(num_codes=3, init_logit_std=1.0)])
def test_without_codes_labelled_pairs_change_nothing(
    latent: LatentSpace | None,
    data: SyntheticPreferences,
    make_module: Any,
    make_trainer: Callable[..., Trainer],
) -> None:
    """Over the pairs that have as many others, it is the policy as it is."""
    data.counts["validation"] = 13
    few, modes = AnnotatorAdaptation(shots=[0, 2, 6]), PreferenceAccuracy()
    (said,) = make_trainer(callbacks=[few, modes]).validate(make_module(latent), data, verbose=False)
    found = few_shot(said)
    assert set(found) == {"prior", "ceiling", "exact/0", "exact/2", "exact/6"} | (
        set() if latent is None else {"no_latent"}
    )
    counts = Counter(str(item["annotator"]) for item in modes.report.items)
    assert sorted(counts.values()) == [6, 7], "one is left out of what takes 6 others"
    for n in (0, 2, 6):
        items = [item for item in modes.report.items if counts[item["annotator"]] > n]
        right = [item["margins"]["prior"] > 0 for item in items]
        assert found[f"exact/{n}"] == pytest.approx(np.mean(right), abs=1e-12)
    assert found["exact/0"] == found["prior"] == said["val/rewards/accuracies"]
    assert Path("adaptation.json").is_file()
    assert not Path("code_weights.json").exists()


def test_pairs_of_nobody_are_left_out_and_columns_can_be_chosen(
    make_module: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """Where domains decide there is no annotator; the factor can stand for one."""
    data = SyntheticPreferences(validation_pairs=12, batch_size=4, cache_dir=str(tmp_path / "cache"))
    module = make_module(MarginalSpace(**CODES))
    (said,) = make_trainer(callbacks=[AnnotatorAdaptation()]).validate(module, data, verbose=False)
    assert few_shot(said) == {}
    assert not Path("adaptation.json").exists()
    callback = AnnotatorAdaptation(column="factor", shots=[0, 1])
    (said,) = make_trainer(callbacks=[callback]).validate(module, data, verbose=False)
    assert set(few_shot(said)) == {"exact/0", "exact/1", "prior", "no_latent"}
    examples = data.generator.examples(12, "validation")
    assert set(callback.report.annotators) == {example.factor for example in examples}
    assert sum(callback.report.annotators.values()) == 12


def test_a_fit_logs_it_and_leaves_its_files_in_the_run_folder(
    data: SyntheticPreferences, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=GumbelSpace(**CODES))
    callback = AnnotatorAdaptation(shots=[0, 1, 2], rounds=2)
    logger = CSVLogger(tmp_path, name="", version="run")
    trainer = make_trainer(
        callbacks=[callback], logger=logger, max_epochs=1, num_sanity_val_steps=1, log_every_n_steps=1
    )
    trainer.fit(module, data)
    metrics = trainer.callback_metrics
    record = json.loads((tmp_path / "run" / "adaptation.json").read_text())
    assert (record["column"], record["shots"], record["rounds"], record["seed"]) == ("annotator", [0, 1, 2], 2, 0)
    assert sum(record["annotators"].values()) == 14
    for kind in ("exact", "amortised"):
        for n in ("0", "1", "2"):
            assert record["scores"][kind][n]["accuracy"] == float(metrics[f"val/adaptation/{kind}/{n}"])
            assert record["scores"][kind][n]["pairs"] == 14
    weights = json.loads((tmp_path / "run" / "code_weights.json").read_text())
    assert set(weights) == set(record["annotators"])
    for each in weights.values():
        assert len(each) == 4
        assert np.sum(each) == pytest.approx(1)
    assert "val/adaptation/exact/2" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert not any("adaptation" in name for name in trainer.progress_bar_metrics)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shots: found \[-1\]"):
        AnnotatorAdaptation(shots=[-1])
