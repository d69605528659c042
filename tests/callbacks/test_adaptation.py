"""Tests of AnnotatorAdaptation in real runs: against the module pair by pair, in every space, and its files."""

from __future__ import annotations

import json
import re
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
from lpc_lightning.data import PreferenceData, SyntheticPreferences
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.cells.cell_run import write_pairs
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder
from lpc_lightning.evaluation.adaptation.inference import CodeTables, code_weights
from lpc_lightning.evaluation.adaptation.scores import PairTables, adaptation_scores
from lpc_lightning.evaluation.report.runs.pairs import prompt_scores
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.latent import ExpectedSpace, GaussianSpace, GumbelSpace, LatentSpace, MarginalSpace, MLPSpace
from lpc_lightning.policy import TinyPolicy
from lpc_lightning.robust import REPO

CODES: dict[str, Any] = {"num_codes": 4, "init_logit_std": 2.0}


@pytest.fixture(autouse=True)
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers without a logger write to the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(cache_dir: Path) -> SyntheticPreferences:
    """14 validation pairs of 2 annotators in batches of 4, 4, 4 and 2; 9 test pairs."""
    return SyntheticPreferences(
        "hidden",
        train_pairs=8,
        validation_pairs=14,
        test_pairs=9,
        annotators=2,
        batch_size=4,
        cache_dir=str(cache_dir),
    )


@pytest.fixture
def make_module(perturb: Callable[..., None]) -> Callable[..., DPO | IPO]:
    """Function that makes a policy that differs from its reference, with codes that differ."""

    def make(latent: LatentSpace | None, kind: type[DPO | IPO] = DPO) -> DPO | IPO:
        module = kind(policy=TinyPolicy(width=16, layers=1, heads=2), latent=latent, beta=1.0, reference="live")
        module.configure_model()
        perturb(module.policy, deviation=0.05)
        if latent is not None:
            perturb(latent, deviation=0.5)
        return module

    return make


def adaptation_metrics(metrics: Any) -> dict[str, float]:
    """Select the metrics of the callback, without the shares of pairs."""
    found = {name.partition("adaptation/")[2]: value for name, value in metrics.items() if "adaptation/" in name}
    return {name: value for name, value in found.items() if not name.startswith("share_of_pairs/")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [DPO, IPO])
@pytest.mark.parametrize("latent", [MarginalSpace(**CODES), ExpectedSpace(**CODES), GumbelSpace(**CODES)])
def test_metrics_against_the_module(
    latent: LatentSpace,
    kind: type[DPO | IPO],
    data: SyntheticPreferences,
    make_module: Any,
    make_trainer: Callable[..., Trainer],
) -> None:
    """Losses of single pairs under single codes, with the swapped pair as a separate pair, then the tested formulas."""
    module, callback = make_module(latent, kind), AnnotatorAdaptation(shots=[0, 1, 3], rounds=4, seed=7)
    trainer = make_trainer(callbacks=[callback])
    (logged,) = trainer.validate(module, data, verbose=False)
    tables, ids, annotators = tables_of(module, data)
    expected = adaptation_scores(PairTables(tables, ids, annotators), (0, 1, 3), rounds=4, seed=7)
    assert set(expected) == ({"exact"} if isinstance(latent, MarginalSpace) else {"exact", "amortized"})
    metrics = adaptation_metrics(logged)
    curves = [*expected, "adapted"]
    assert set(metrics) == {f"{kind}/{n}" for kind in curves for n in (0, 1, 3)} | {"prior", "no_latent", "ceiling"}
    assert [metrics[f"adapted/{n}"] for n in (0, 1, 3)] == [metrics[f"exact/{n}"] for n in (0, 1, 3)]
    for kind, scores in expected.items():
        for n, score in scores.items():
            assert metrics[f"{kind}/{n}"] == pytest.approx(score.accuracy, abs=1e-9)
    for name, weights in code_weights(tables, annotators).items():
        assert callback.report.weights[name] == pytest.approx(weights, abs=1e-3)
    assert metrics["ceiling"] == 1


@torch.no_grad()
def tables_of(module: Any, data: SyntheticPreferences) -> tuple[CodeTables, list[str], list[str]]:
    """Compute the tables one pair at a time, sorted by id."""
    layout, space, columns = data.make_layout(), module.latent, []
    pairs = sorted(data.pairs["validation"], key=lambda pair: pair.id)
    for pair in pairs:
        rows = []
        for labelled in (pair, pair.swapped()):
            batch = layout([labelled])
            forward, score = module.score_batch(batch)
            nats = 4.0 if isinstance(module, IPO) else 1.0  # its loss is 1/4 at a margin of 0, with beta = 1
            losses = [nats * score.under(code[None])[0].losses for code in space.codebook.weight]
            rows.append(torch.cat(losses))
            if labelled is pair:
                prior = space.log_prior(forward.states.prompt)[0]
                posterior = space.log_posterior(forward.states, score)[0]
        columns.append((prior, *rows, posterior))
    tables = [torch.stack(values).double().numpy() for values in zip(*columns, strict=True)]
    learned = None if isinstance(space, MarginalSpace) else tables[3]
    return CodeTables(*tables[:3], learned), [pair.id for pair in pairs], [pair.annotator for pair in pairs]


def test_zero_shots_is_the_marginal_accuracy(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    module = make_module(MarginalSpace(**CODES))
    trainer = make_trainer(callbacks=[AnnotatorAdaptation(), PreferenceAccuracy()])
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        (logged,) = run(module, datamodule=data, verbose=False)
        assert logged[f"{stage}/adaptation/exact/0"] == logged[f"{stage}/accuracy/marginal"]
        assert logged[f"{stage}/adaptation/prior"] == logged[f"{stage}/rewards/accuracies"]
        assert logged[f"{stage}/adaptation/no_latent"] == logged[f"{stage}/accuracy/no_latent"]


def test_cells_record_every_mean_over_pairs(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """A report finds what each prompt adds to a metric, of all metrics but those named here."""
    trainer = make_trainer(callbacks=[AnnotatorAdaptation(under_z=True), PreferenceAccuracy(["annotator"])])
    (logged,) = trainer.test(make_module(GumbelSpace(**CODES)), datamodule=data, verbose=False)
    folder = CellFolder(tmp_path / "cell")
    folder.path.mkdir()
    write_pairs(folder, "test", trainer)
    record = RunRecord("cell", folder=folder.run, grid="grid", metrics=logged)
    on_record = {name: scores for name in logged if (scores := prompt_scores(record, name).added) is not None}
    others = re.compile(
        "test/(pairs.*|latent/.*|rewards/(chosen|rejected)|logps/.*|adaptation/(ceiling|share_of_pairs/.*)"
        "|share_of_best|kl.*|z_.*|.*entropy.*)"
    )
    assert {name for name in logged if not others.fullmatch(name)} == set(on_record)
    for name, other in (("exact/0", "accuracy/marginal"), ("exact_z/0", "rewards/accuracies")):
        ours, theirs = (on_record[f"test/{each}"].prompts for each in (f"adaptation/{name}", other))
        assert ours.deviations == pytest.approx(theirs.deviations)
        assert ours.shares == pytest.approx(theirs.shares)
    people = {pair.annotator for pair in data.pairs["test"]}
    of_people = {name for name, added in on_record.items() if added.annotators is not None}
    assert of_people == {name for name in on_record if "/adaptation/" in name}
    for name in ("prior", "exact/0", "exact_z/0"):
        annotators = on_record[f"test/adaptation/{name}"].annotators
        assert annotators is not None
        assert set(annotators.deviations) == people


def test_useless_labels_leave_the_preference(
    data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    """Labels that are wrong half of the time favour no code. The predictions are those of the preference."""
    module, shots, found = make_module(MarginalSpace(num_codes=3, init_logit_std=2.0)), [0, 1, 5], []
    for robust_loss in (None, REPO(initial=0.5)):
        module.robust_loss = robust_loss
        callback = AnnotatorAdaptation(shots=shots)
        (logged,) = make_trainer(callbacks=[callback]).validate(module, data, verbose=False)
        found.append([logged[f"val/adaptation/exact/{n}"] for n in shots])
    assert found[1] == [found[0][0]] * 3
    assert found[0][0] != 0.5
    batch = data.make_layout()(list(data.pairs["validation"]))
    with torch.no_grad():
        prior = module.latent.log_prior(module.policy(batch).states.prompt).exp().double().numpy()
    for name, weights in callback.report.weights.items():
        own = [annotator == name for annotator in batch.annotators]
        assert weights == pytest.approx(prior[own].mean(0), abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 14])
def test_metrics_do_not_depend_on_batches(
    batch_size: int, data: SyntheticPreferences, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    module, results = make_module(ExpectedSpace(**CODES)), []
    for data.eval_batch_size in (4, batch_size):
        (logged,) = make_trainer(callbacks=[AnnotatorAdaptation(shots=[0, 2])]).validate(module, data, verbose=False)
        results.append(adaptation_metrics(logged))
    assert results[0] == pytest.approx(results[1], abs=1e-9)


@pytest.mark.parametrize("latent", [None, MLPSpace(hidden=4), GaussianSpace(num_codes=3, init_logit_std=1.0)])
def test_policy_without_codes_does_not_adapt(
    latent: LatentSpace | None,
    data: SyntheticPreferences,
    make_module: Any,
    make_trainer: Callable[..., Trainer],
) -> None:
    """The metric is the accuracy of the policy over the pairs with enough others of the annotator."""
    data.counts["validation"] = 13
    adaptation, modes = AnnotatorAdaptation(shots=[0, 2, 6]), PreferenceAccuracy()
    (logged,) = make_trainer(callbacks=[adaptation, modes]).validate(make_module(latent), data, verbose=False)
    metrics = adaptation_metrics(logged)
    curves = ["exact"] if isinstance(latent, GaussianSpace) else ["exact", "adapted"]
    levels = {"prior", "ceiling"} | (set() if latent is None else {"no_latent"})
    assert set(metrics) == {f"{kind}/{n}" for kind in curves for n in (0, 2, 6)} | levels
    counts = Counter(str(item["annotator"]) for item in modes.report.items)
    assert sorted(counts.values()) == [6, 7], "the annotator with 6 pairs is left out at 6 shots"
    for n in (0, 2, 6):
        items = [item for item in modes.report.items if counts[item["annotator"]] > n]
        right = [item["margins"]["prior"] > 0 for item in items]
        assert metrics[f"exact/{n}"] == pytest.approx(np.mean(right), abs=1e-12)
        assert logged[f"val/adaptation/share_of_pairs/{n}"] == pytest.approx(len(items) / 13, abs=1e-12)
    assert metrics["exact/0"] == metrics["prior"] == logged["val/rewards/accuracies"]
    assert Path("adaptation.json").is_file()
    assert not Path("code_weights.json").exists()


def test_column_of_annotators(make_module: Any, make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Pairs decided by domain have no annotator, but a factor that can be used as one."""
    data = SyntheticPreferences(validation_pairs=12, batch_size=4, cache_dir=str(tmp_path / "cache"))
    module = make_module(MarginalSpace(**CODES))
    (logged,) = make_trainer(callbacks=[AnnotatorAdaptation()]).validate(module, data, verbose=False)
    assert adaptation_metrics(logged) == {}
    assert not Path("adaptation.json").exists()
    callback = AnnotatorAdaptation(column="factor", shots=[0, 1])
    (logged,) = make_trainer(callbacks=[callback]).validate(module, data, verbose=False)
    assert set(adaptation_metrics(logged)) == {
        "exact/0", "exact/1", "adapted/0", "adapted/1", "prior", "no_latent",
    }  # fmt: skip
    examples = data.generator.examples(12, "validation")
    assert set(callback.report.annotators) == {example.factor for example in examples}
    assert sum(callback.report.annotators.values()) == 12


def test_fit_logs_and_writes_files(
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
    for kind in ("exact", "amortized"):
        for n in ("0", "1", "2"):
            assert record["scores"][kind][n]["accuracy"] == float(metrics[f"val/adaptation/{kind}/{n}"])
            assert record["scores"][kind][n]["pairs"] == 14
    weights = json.loads((tmp_path / "run" / "code_weights.json").read_text())
    assert set(weights) == set(record["annotators"])
    for vector in weights.values():
        assert len(vector) == 4
        assert np.sum(vector) == pytest.approx(1)
    assert "val/adaptation/exact/2" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert not any("adaptation" in name for name in trainer.progress_bar_metrics)


@pytest.fixture
def votes(tmp_path: Path) -> PreferenceData:
    """Yes or no to 24 statements, 6 of them in the test, by annotators who mostly agree or mostly disagree."""
    answers = ["No.", "Yes."]
    rows = [
        {"id": f"{name} {number}", "prompt": f"Statement {number}?", "annotator": name,
         "chosen": answers[label], "rejected": answers[not label], "split": "test" if number % 4 == 0 else "train"}
        for number in range(24) for name, label in (("anna", number % 5 > 0), ("ben", number % 5 == 0))
    ]  # fmt: skip
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PreferenceData(str(path), validation_share=0.0, batch_size=6, cache_dir=str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("latent", [None, GaussianSpace(num_codes=3), MarginalSpace(**CODES)])
def test_labels_of_training_pairs(
    latent: LatentSpace | None, votes: PreferenceData, make_trainer: Callable[..., Trainer]
) -> None:
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2), latent=latent)
    callback = AnnotatorAdaptation(shots=[0, 8, 16], rounds=2, training_pairs=16, under_z=True)
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(module, votes)
    assert not adaptation_metrics(trainer.callback_metrics), "they are scored after the fit"
    (logged,) = trainer.test(module, votes, verbose=False)
    metrics = adaptation_metrics(logged)
    inferences = {None: [], GaussianSpace: ["amortized_z"], MarginalSpace: ["exact_z"]}[latent and type(latent)]
    levels = {"prior", "others_majority"} | ({"no_latent"} if latent else set())
    curves = ["exact", "own_majority", "adapted", *inferences]
    assert set(metrics) == {f"{kind}/{n}" for kind in curves for n in (0, 8, 16)} | levels
    # A majority of 8 or 16 labels is clear: both annotators keep to theirs in 4 of the 6 test statements.
    assert [metrics[f"own_majority/{n}"] for n in (0, 8, 16)] == pytest.approx([0.5, 4 / 6, 4 / 6])
    assert metrics["others_majority"] == 0, "the other one always votes the other way"
    assert callback.report.labelled == {"anna": 16, "ben": 16}
    for name in inferences:
        assert metrics[f"{name}/0"] == metrics["prior"]
    headline = "amortized_z" if isinstance(latent, GaussianSpace) else "exact"
    assert [metrics[f"adapted/{n}"] for n in (8, 16)] == [metrics[f"{headline}/{n}"] for n in (8, 16)]


def test_labels_of_pairs_with_one_id(votes: PreferenceData, make_trainer: Callable[..., Trainer]) -> None:
    """An id may name the annotator alone, or the row of one of two data sets."""
    path = Path(str(votes.path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "id": row["annotator"]}) + "\n" for row in rows))
    callback = AnnotatorAdaptation(shots=[0, 8], rounds=2, training_pairs=16)
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2))
    trainer.fit(module, votes)
    trainer.test(module, votes, verbose=False)
    assert callback.report.labelled == {"anna": 16, "ben": 16}


def test_labels_take_no_pass_without_a_latent(
    votes: PreferenceData, make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = AnnotatorAdaptation(shots=[0, 8], rounds=2, training_pairs=16)
    trainer = make_trainer(callbacks=[callback], max_epochs=1)
    module = DPO(policy=TinyPolicy(width=16, layers=1, heads=2))
    trainer.fit(module, votes)
    scored: list[str] = []
    score = module.score_batch

    def counted(batch: Any, *settings: Any) -> Any:
        scored.extend(batch.ids)
        return score(batch, *settings)

    monkeypatch.setattr(module, "score_batch", counted)
    trainer.test(module, votes, verbose=False)
    assert sorted(scored) == sorted(f"{name} {number}" for name in ("anna", "ben") for number in range(0, 24, 4))


def test_labels_of_training_pairs_need_a_fit(
    votes: PreferenceData, make_module: Any, make_trainer: Callable[..., Trainer]
) -> None:
    trainer = make_trainer(callbacks=[AnnotatorAdaptation(training_pairs=4)])
    with pytest.raises(ConfigError, match=r"found 4 in a run without labelled training pairs .* expected a fit"):
        trainer.test(make_module(None), votes, verbose=False)


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"shots: found \[-1\]"):
        AnnotatorAdaptation(shots=[-1])
