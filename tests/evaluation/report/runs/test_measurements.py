"""Tests of joining measurements to their runs, and of the conditions of measurements."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.benchmarks.results import BenchmarkResults, write_results
from lpc_lightning.evaluation.report.runs.differences import add_axes
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.runs.records import Measurement, RunRecord, check_conditions, join_measurements


def test_join_measurements_of_a_test(runs: Path) -> None:
    loaded = load_folders([str(runs)])
    assert len(loaded.records) == 2
    records, notes = join_measurements(add_axes(loaded.records), loaded.measurements)
    plain, coded = records
    assert (plain.axes["latent"], coded.axes["latent"]) == ("none", "MarginalSpace")
    assert "latent.num_codes" not in coded.axes
    assert 0 <= coded.metrics["test/rewards/accuracies"] <= 1
    assert "test/rewards/accuracies" not in plain.metrics
    assert notes == []


def write_evaluation(
    folder: Path,
    model: str,
    score: float,
    kind: str = "checkpoint",
    limit: int | None = None,
    name: str = "arc_easy/acc",
    precision: str | None = None,
) -> Path:
    """Write results as `evaluate` does. `name` is the task and its metric."""
    task, _, metric = name.partition("/")
    metrics = {task: {metric: score, f"{metric}_stderr": 0.01}}
    record = {"packages": {"torch": "2.13.0"}, "tasks": {task: {"limit": limit, "version": 1}}}
    origin = {
        "path": model,
        "kind": kind,
        "seed": 3,
        "name": folder.name,
        "request": {"model": model, "precision": precision},
    }
    write_results(folder, BenchmarkResults(metrics, [], {}, record), origin)
    return folder


def test_join_measurements_of_benchmarks(runs: Path, tmp_path: Path) -> None:
    checkpoint = str(next(runs.glob("version_1/checkpoints/*.ckpt")))
    results = write_evaluation(tmp_path / "lpc", checkpoint, 0.4)
    for paths in ([str(runs), str(results)], [str(results)]):
        loaded = load_folders(paths)
        records, _ = join_measurements(add_axes(loaded.records), loaded.measurements)
        (record,) = (record for record in records if "arc_easy/acc" in record.metrics)
        assert record.folder == runs / "version_1"
        assert record.metrics["arc_easy/acc"] == 0.4
        assert "arc_easy/acc_stderr" not in record.metrics
        assert record.seed == 3
        assert loaded.origins[0].facts["versions"] == {"torch": "2.13.0"}


def test_join_measurements_without_run(tmp_path: Path) -> None:
    plain = write_evaluation(tmp_path / "base", "models/base", 0.3, "model")
    gone = write_evaluation(tmp_path / "gone", str(tmp_path / "runs" / "checkpoints" / "best.ckpt"), 0.4)
    loaded = load_folders([str(plain), str(gone)])
    records, notes = join_measurements(add_axes(loaded.records), loaded.measurements)
    assert [(record.axes, record.metrics) for record in records] == [
        ({"model": "base"}, {"arc_easy/acc": 0.3}),
        ({"model": "gone"}, {"arc_easy/acc": 0.4}),
    ]
    ((name, status, why),) = notes
    assert (name, status) == ("gone", "no run")
    assert why.startswith(f"found no run in {tmp_path / 'runs'}: ")


def test_join_measurements_after_a_move(tmp_path: Path) -> None:
    """Runs and results are moved together, then the results alone."""
    write_measured(tmp_path / "old" / "runs", "last")
    checkpoint = tmp_path / "old/runs/fit/checkpoints/last.ckpt"
    checkpoint.touch()
    write_evaluation(tmp_path / "old" / "results" / "lpc", str(checkpoint), 0.4)
    (tmp_path / "old").rename(tmp_path / "new")
    (record,) = joined(tmp_path / "new/runs/fit", tmp_path / "new/results")
    assert (record.folder, record.metrics["arc_easy/acc"]) == (tmp_path / "new/runs/fit", 0.4)
    (tmp_path / "new/results/lpc").rename(tmp_path / "lpc")
    assert [record.axes.get("model") for record in joined(tmp_path / "new/runs/fit", tmp_path / "lpc")] == [None, "lpc"]


@pytest.mark.parametrize("metric", ["arc_easy/acc", "preferences/accuracy/prior"])
def test_measurements_under_other_conditions(metric: str, tmp_path: Path) -> None:
    paths = [
        str(write_evaluation(tmp_path / name, name, 0.3, "model", limit, metric))
        for name, limit in (("a", 100), ("b", 100), ("c", None))
    ]
    alike, _ = join_measurements([], load_folders(paths[:2]).measurements)
    check_conditions(alike, [metric])
    records, _ = join_measurements([], load_folders(paths).measurements)
    check_conditions(records, ["loss"])
    with pytest.raises(ConfigError, match=f"{metric} measured with limit 100 for a and none for c, expected equal"):
        check_conditions(records, [metric])


def write_measured(folder: Path, checkpoint: str, **trainer: Any) -> Path:
    """Write a run of `fit`, and a `test` of one of its checkpoints."""
    config = {"seed_everything": 3, "data": {"path": "pairs.jsonl"}, "model": {"class_path": "DPO", "init_args": {}}}
    callbacks = trainer.pop("callbacks", [])
    own = {"precision": "32-true", "limit_test_batches": None, "limit_val_batches": None}
    run, path = folder / "fit", folder / "fit" / "checkpoints" / f"{checkpoint}.ckpt"
    path.parent.mkdir(parents=True)
    (folder / "test").mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "ckpt_path": None, "trainer": own}))
    tested = {**config, "ckpt_path": str(path), "trainer": own | trainer, "callbacks": callbacks}
    (folder / "test" / "config.yaml").write_text(yaml.safe_dump(tested))
    (folder / "test" / "metrics.csv").write_text("step,test/loss,test/adaptation/exact/8\n1,0.5,0.6\n")
    return folder


def joined(*paths: Path) -> list[RunRecord]:
    loaded = load_folders([str(path) for path in paths])
    return join_measurements(add_axes(loaded.records), loaded.measurements)[0]


SHOTS = [{"class_path": "AnnotatorAdaptation", "init_args": {"training_pairs": 32}}]


@pytest.mark.parametrize(
    ("metric", "trainer", "found"),
    [
        ("test/loss", {"limit_test_batches": 3}, r"trainer\.limit_test_batches 3"),
        ("test/loss", {"limit_test_batches": 1}, r"trainer\.limit_test_batches 1"),
        ("test/loss", {"limit_test_batches": 1.0, "limit_val_batches": 2}, None),
        ("test/loss", {"precision": "bf16-mixed"}, r"trainer\.precision bf16-mixed"),
        ("test/loss", {"callbacks": SHOTS}, None),
        ("test/adaptation/exact/8", {"callbacks": SHOTS}, r"callbacks\.AnnotatorAdaptation"),
    ],
)
def test_tests_under_other_settings(metric: str, trainer: dict[str, Any], found: str | None, tmp_path: Path) -> None:
    """The limit 1 is one batch, and 1.0 is all of them, as none is."""
    records = joined(write_measured(tmp_path / "a", "last", **trainer), write_measured(tmp_path / "b", "last"))
    assert all(metric in record.metrics for record in records)
    with pytest.raises(ConfigError, match=f"{metric} measured with {found}") if found else nullcontext():
        check_conditions(records, [metric])


@pytest.mark.parametrize(
    ("first", "second", "fails"),
    [("best", "last", True), ("best", "best", False), ("epoch=0-step=8", "epoch=1-step=16", False)],
)
def test_tests_of_best_and_last_weights(first: str, second: str, fails: bool, tmp_path: Path) -> None:
    paths = [write_measured(tmp_path / name, weights) for name, weights in (("a", first), ("b", second))]
    message = "test/loss measured with weights best for .*/a/fit and last for .*/b/fit"
    with pytest.raises(ConfigError, match=message) if fails else nullcontext():
        check_conditions(joined(*paths), ["test/loss"])


def test_evaluations_of_best_and_last_weights(tmp_path: Path) -> None:
    """A plain model is compared with either. Results without a precision on record are compared with all."""
    paths = {}
    for name, precision in (("best", None), ("last", "float32")):
        run = write_measured(tmp_path / f"run-{name}", name) / "fit"
        model = str(run / "checkpoints" / f"{name}.ckpt")
        paths[name] = write_evaluation(tmp_path / name, model, 0.4, precision=precision)
    for name, precision in (("base", "float32"), ("other", "bfloat16")):
        paths[name] = write_evaluation(tmp_path / name, name, 0.3, "model", precision=precision)
    for names, message in (
        (("base", "best"), None),
        (("base", "last"), None),
        (("best", "last"), "arc_easy/acc measured with weights best for .*run-best/fit and last for .*run-last/fit"),
        (("base", "other"), "arc_easy/acc measured with precision float32 for base and bfloat16 for other"),
    ):
        with pytest.raises(ConfigError, match=message) if message else nullcontext():
            check_conditions(joined(*(paths[name] for name in names)), ["arc_easy/acc"])


def test_test_on_other_pairs() -> None:
    """A test on the run's own data has no conditions beside its settings."""
    settings = {"data": "PreferenceData", "data.path": "one.jsonl", "data.cache_dir": "x"}
    runs = [RunRecord(name, folder=Path(name), settings=settings) for name in ("a", "b")]
    for path, fails in (("one.jsonl", False), ("two.jsonl", True)):
        conditions = {"test/loss": settings | {"data.path": path, "data.cache_dir": "y"}}
        measured = [
            Measurement("a", {"test/loss": 0.5}, Path("a"), Path("t"), 1, conditions),
            Measurement("b", {"test/loss": 0.5}, Path("b"), Path("t"), 1, {"test/loss": settings}),
        ]
        records, _ = join_measurements(runs, measured)
        message = r"data\.path two\.jsonl for a and the run's own for b"
        with pytest.raises(ConfigError, match=message) if fails else nullcontext():
            check_conditions(records, ["test/loss"])


def test_runs_that_score_other_pairs() -> None:
    """The number of training pairs matters to their metrics alone. A run without settings is compared with all."""
    metric = "val/training/gold_accuracy/prior"
    name = "callbacks.PreferenceAccuracy.training_pairs"
    metrics = {metric: 0.5, "test/loss": 0.5}
    runs = [RunRecord(f"of {count}", settings={name: count}, metrics=metrics) for count in (512, 8)]
    check_conditions([*runs, RunRecord("plain", metrics=metrics)], ["test/loss"])
    check_conditions([runs[0], RunRecord("plain", metrics=metrics)], [metric])
    with pytest.raises(ConfigError, match=f"measured with {name} 512 for of 512 and 8 for of 8, expected equal"):
        check_conditions(runs, [metric])


def test_join_measurements_measured_twice(runs: Path, tmp_path: Path) -> None:
    checkpoint = str(next(runs.glob("version_1/checkpoints/*.ckpt")))
    paths = [str(write_evaluation(tmp_path / name, checkpoint, score)) for name, score in (("a", 0.4), ("b", 0.5))]
    loaded = load_folders([str(runs), *paths])
    records, notes = join_measurements(add_axes(loaded.records), loaded.measurements)
    assert [record.metrics.get("arc_easy/acc") for record in records] == [None, 0.5]
    ((_, status, why),) = notes
    assert status == "repeated"
    assert "arc_easy/acc" in why
    assert str(tmp_path / "b") in why
