"""Tests of reading the folders of ablations, fits and evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.data import DataError
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.report.contrasts import contrasts
from lpc_lightning.evaluation.report.runs.fit import load_run, read_curves
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.runs.records import (
    Curve,
    RunRecord,
)
from lpc_lightning.evaluation.report.study import make_study


def by_name(records: list[RunRecord] | tuple[RunRecord, ...]) -> dict[str, RunRecord]:
    return {record.name: record for record in records}


# Any folder


def test_folders_far_below(write_ablation: Callable[..., Path], tmp_path: Path) -> None:
    """A link to a folder above itself is not followed."""
    folder = write_ablation({"latent": ["none"]}, [1], lambda *cell: 0.5)
    top = tmp_path / "top"
    deep = top / "a/b/c/d/e/f"
    deep.mkdir(parents=True)
    folder.rename(deep / "grid")
    (deep / "link").symlink_to(top, target_is_directory=True)
    (record,) = load_folders([str(top)]).records
    assert record.folder == deep / "grid/cells/latent=none,seed=1/run"


# Ablations


def test_load_ablation(write_ablation: Callable[..., Path]) -> None:
    error = "Traceback ...\nFloatingPointError: loss is nan"
    values = {("none", 1): 0.5, ("none", 2): 0.6, ("marginal", 1): error, ("marginal", 2): None}
    folder = write_ablation({"latent": ["none", "marginal"]}, [1, 2], lambda *cell: values[cell])
    loaded = load_folders([str(folder)])
    assert loaded.axes == {"latent": ("none", "marginal")}
    assert [(origin.name, origin.command) for origin in loaded.origins] == [
        ("trial", "lpc-lightning ablate trial.yaml")
    ]
    records = by_name(loaded.records)
    assert len(records) == len(loaded.records) == 4
    first = records["latent=none,seed=1"]
    assert (first.axes, first.seed, first.status, first.error) == ({"latent": "none"}, 1, "finished", None)
    assert first.metrics["val/rewards/accuracies"] == 0.5
    assert first.metrics["test/rewards/accuracies"] == pytest.approx(0.4)
    assert first.metrics["train/loss"] == pytest.approx(0.35)
    assert first.parameters == {"policy": 1000, "latent": 0}
    assert (first.seconds, first.peak_bytes) == (11.0, 2**30)
    assert first.settings["model.beta"] == 0.1
    assert first.curves["val/rewards/accuracies"].steps == (1, 3, 5, 7)
    failed = records["latent=marginal,seed=1"]
    assert (failed.status, failed.error, failed.counted) == ("failed", error, False)
    missing = records["latent=marginal,seed=2"]
    assert (missing.axes, missing.seed, missing.status) == ({"latent": "marginal"}, 2, "missing")


def test_cell_of_earlier_version(write_ablation: Callable[..., Path]) -> None:
    """The error names the cell's file, and not the whole ablation."""
    folder = write_ablation({"latent": ["none"]}, [1, 2], lambda *cell: 0.5)
    path = folder / "cells/latent=none,seed=2/cell.json"
    cell = json.loads(path.read_text())
    del cell["places"]
    path.write_text(json.dumps(cell))
    with pytest.raises(DataError, match="found no entry places: an earlier version") as caught:
        load_folders([str(folder)])
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("skip", "codes"), [({"latent": "none", "codes": [16, 32]}, [16]), ({"codes": 16}, []), ({"codes": 16.0}, [])]
)
def test_load_ablation_skipped_cells(
    write_ablation: Callable[..., Path], skip: dict[str, Any], codes: list[int]
) -> None:
    """Numbers are compared as `ablate` compares them: 16.0 is 16."""
    axes = {"latent": ["none", "marginal"], "codes": [8, 16]}
    cells = {("none", 8, 1): 0.5, ("marginal", 8, 1): 0.6}
    folder = write_ablation(axes, [1], lambda *cell: cells.get(cell))
    ablation = json.loads((folder / "ablation.json").read_text())
    ablation["skip"] = [skip]
    (folder / "ablation.json").write_text(json.dumps(ablation))
    missing = [record.axes["codes"] for record in load_folders([str(folder)]).records if record.status == "missing"]
    assert missing == codes


def test_load_ablation_with_named_seeds(write_ablation: Callable[..., Path]) -> None:
    """Values of the axis `seed` may have names, such as those of a seed with its data. Runs are paired by them."""
    lost = ("x", 3)
    folder = write_ablation({"latent": ["none", "x"]}, [1, 2, 3], lambda *cell: None if cell == lost else cell[1] / 10)
    for path in [folder / "ablation.json", *folder.glob("cells/*/cell.json")]:
        content = json.loads(path.read_text())
        seed = content["axes"]["seed"]
        content["axes"]["seed"] = [f"s{each}" for each in seed] if isinstance(seed, list) else f"s{seed}"
        path.write_text(json.dumps(content))
    records = load_folders([str(folder)]).records
    assert [(record.axes, record.seed) for record in records if record.status == "missing"] == [({"latent": "x"}, "s3")]
    (contrast,), _ = contrasts(make_study(records), ["val/rewards/accuracies"], {"latent": "none"})
    assert contrast.difference is not None
    assert (contrast.difference.estimate.n, contrast.difference.estimate.mean) == (2, 0)
    assert contrast.unpaired == ("s3",)


def test_load_ablation_without_seeds(write_ablation: Callable[..., Path]) -> None:
    folder = write_ablation({"rate": [0.1, 0.5]}, [None], lambda rate, seed: rate)
    assert [record.status for record in load_folders([str(folder)]).records] == ["finished"] * 2


def test_load_ablation_null_metric(write_ablation: Callable[..., Path]) -> None:
    folder = write_ablation({"rate": [0.1]}, [1], lambda rate, seed: rate)
    (path,) = folder.glob("cells/*/results.json")
    results = json.loads(path.read_text())
    results["metrics"]["val/rewards/accuracies"] = None
    path.write_text(json.dumps(results))
    (record,) = load_folders([str(folder)]).records
    assert math.isnan(record.metrics["val/rewards/accuracies"])


def test_load_cell_of_best_weights(write_ablation: Callable[..., Path]) -> None:
    """What the fit alone has logged are scores of its last weights, and its last validation is not that of the best."""
    folder = write_ablation({"rate": [0.6]}, [1], lambda rate, seed: rate)
    (cell,) = folder.glob("cells/*")
    (cell / "cell.json").write_text(json.dumps(json.loads((cell / "cell.json").read_text()) | {"weights": "best"}))
    header = "epoch,step,train/loss,val/training/wrong_label_auroc/prior,val/rewards/accuracies\n"
    (cell / "run" / "metrics.csv").write_text(f"{header}0,3,0.6,,0.7\n0,7,0.5,0.8,0.55\n1,7,,,0.7\n")
    (record,) = load_folders([str(folder)]).records
    assert set(record.metrics) == {"train/loss", "val/rewards/accuracies", "test/rewards/accuracies"}
    assert record.curves["val/rewards/accuracies"].values == (0.7, 0.55)


def test_load_cell_finished_without_results(write_ablation: Callable[..., Path]) -> None:
    folder = write_ablation({"rate": [0.1]}, [1], lambda rate, seed: rate)
    (path,) = folder.glob("cells/*/results.json")
    path.unlink()
    (record,) = load_folders([str(folder)]).records
    assert (record.status, record.error) == ("failed", "The cell is finished, but results.json is missing.")


def test_load_folders_cell_and_parent_folders(write_ablation: Callable[..., Path]) -> None:
    one = write_ablation({"rate": [0.1]}, [1], lambda rate, seed: rate, "one")
    two = write_ablation({"rate": [0.3]}, [1], lambda rate, seed: rate, "two")
    (cell,) = one.glob("cells/*")
    assert [record.axes for record in load_folders([str(cell)]).records] == [{"rate": 0.1}]
    loaded = load_folders([str(one.parent), str(two.parent), str(one)])
    assert [record.axes for record in loaded.records] == [{"rate": 0.1}, {"rate": 0.3}]
    assert loaded.axes == {"rate": (0.1, 0.3)}


def test_load_folders_without_results(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=r"found no results in .*ablate.*ablation\.json"):
            load_folders([str(path)])


@pytest.mark.parametrize("text", ["{", '{"axes": 3}', '{"name": "x"}'])
def test_load_folders_broken_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "ablation.json").write_text(text)
    with pytest.raises(DataError, match=r"ablation\.json or a file beside it cannot be read"):
        load_folders([str(tmp_path)])


# Curves


def test_read_curves_first_value_of_each_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(
        "epoch,step,train/loss,val/loss,lr-AdamW\n0,0,0.7,,1\n0,0,,0.9,\n0,0,,0.8,\n0,5,nan,,1\n0,9,0.5,,1\n0,9,,nan,\n"
    )
    curves = read_curves(path)
    assert set(curves) == {"train/loss", "val/loss"}
    assert curves["train/loss"] == (0.5, Curve((0, 9), (0.7, 0.5)))
    last, curve = curves["val/loss"]
    assert math.isnan(last)
    assert curve == Curve((0,), (0.9,))


@pytest.mark.parametrize("text", ["", "epoch,loss\n0,1\n"])
def test_read_curves_without_steps(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    assert read_curves(tmp_path / "metrics.csv") == {}
    assert read_curves(tmp_path / "nothing.csv") == {}


# Fits


@pytest.mark.slow
def test_load_run_of_a_fit(runs: Path) -> None:
    loaded = load_folders([str(runs / "version_1")])
    (record,) = loaded.records
    summary = json.loads((runs / "version_1" / "summary.json").read_text())
    assert (record.seed, record.status, record.folder) == (3, "finished", runs / "version_1")
    accuracy = record.metrics["val/rewards/accuracies"]
    assert accuracy == pytest.approx(summary["validation_after"]["rewards/accuracies"])
    assert record.curves["train/loss"].steps == (0, 1, 2)
    assert record.seconds == pytest.approx(3 * summary["resources"]["seconds_per_step"])
    assert record.peak_bytes == pytest.approx(2**30 * summary["resources"]["peak_memory_gib"])
    assert record.settings["latent.num_codes"] == 3
    assert record.versions["packages.torch"] == version("torch")
    assert record.parameters["latent"] > 3 * 16
    assert record.parameters["policy"] == load_folders([str(runs / "version_0")]).records[0].parameters["policy"]


@pytest.mark.slow
def test_load_run_without_summary(runs: Path) -> None:
    (record,) = load_folders([str(runs / "version_0")]).records
    assert (record.status, record.counted) == ("unknown", True)
    assert record.error == "summary.json is missing or damaged, so that it is not known whether the run finished"
    assert record.parameters["latent"] == 0


def test_load_run_with_damaged_summary(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "summary.json").write_text('{"steps": 1')
    with pytest.warns(UserWarning, match=r"summary\.json: found no JSON .* It is not known whether the run finished"):
        (record,) = load_run(tmp_path).records
    assert (record.status, record.seconds) == ("unknown", None)
