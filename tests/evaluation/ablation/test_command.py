"""Tests of whole ablations with real fits: finished, repeated, resumed and failed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from lpc_lightning.cli.system_errors import SPACE
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder, Weights
from lpc_lightning.evaluation.ablation.cells.work import log_fault
from lpc_lightning.evaluation.ablation.command import ablate, main
from lpc_lightning.evaluation.report.command import report
from tests.fixtures.processes import forked_command

pytestmark = pytest.mark.slow

Read = Callable[[Path], dict[str, bytes]]


def record(cell: Path) -> dict[str, Any]:
    return json.loads((cell / "cell.json").read_text())


def test_ablate_files_of_every_cell(uninterrupted: Path) -> None:
    cells = sorted((uninterrupted / "cells").iterdir())
    assert {cell.name for cell in cells} == {
        f"latent={latent},noise={noise},seed=1" for latent in ("gumbel", "none") for noise in ("0.5", "0")
    }
    for cell in cells:
        cell_record, results = record(cell), json.loads((cell / "results.json").read_text())
        assert (cell_record["status"], cell_record["error"]) == ("finished", None)
        assert (cell_record["attempts"], cell_record["seed"]) == (1, 1)
        assert cell_record["seconds"] > 0
        assert cell_record["peak_bytes"] > 2**26
        assert results["axes"] == cell_record["axes"]
        assert results["step"] == 24
        assert 0 <= results["metrics"]["val/rewards/accuracies"] <= 1
        assert 0 <= results["metrics"]["test/rewards/accuracies"] <= 1
        pairs = [json.loads(line) for line in (cell / "pairs_test.jsonl").read_text().splitlines()]
        assert len(pairs) == 4
        right = [pair["margins"]["prior"] > 0 for pair in pairs]
        assert sum(right) / 4 == results["metrics"]["test/rewards/accuracies"]
        assert results["parameters"]["policy"] > 0
        assert (results["parameters"]["latent"] > 0) == (cell_record["axes"]["latent"] == "gumbel")
        noise = json.loads((cell / "run" / "label_noise.json").read_text())
        assert noise["rate"] == cell_record["axes"]["noise"]
        assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in (cell / "run").iterdir()}
    overview = json.loads((uninterrupted / "ablation.json").read_text())
    assert overview["name"] == "small"
    assert overview["axes"] == {"latent": ["none", "gumbel"], "noise": [0, 0.5], "seed": [1]}
    assert overview["command"].startswith("lpc-lightning ablate ")


def test_ablate_computes_shared_data_once(uninterrupted: Path) -> None:
    logs = [(cell / "log.txt").read_text() for cell in (uninterrupted / "cells").iterdir()]
    lines = [line for log in logs for line in log.splitlines() if "reference log-probabilities" in line]
    for stage in ("train", "validation", "test"):
        computed = [line for line in lines if line.startswith(f"{stage}:") and "computed in" in line]
        assert len(computed) == 1, computed


def test_ablate_skips_finished_cells(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "cells").rglob("*")}
    assert ablate([str(uninterrupted.parent / "small.yaml")], output=str(uninterrupted), threads=1)
    assert {path: path.stat().st_mtime_ns for path in (uninterrupted / "cells").rglob("*")} == before
    output = capsys.readouterr().out
    assert "0 cells to run" in output
    assert "4 ended before" in output
    assert "lpc-lightning report" in output


def test_cell_independent_of_order_and_processes(uninterrupted: Path, grid: Path, read_results: Read) -> None:
    output = grid.parent / "out"
    settings: dict[str, Any] = {"processes": 2, "threads": 1, "remove_checkpoints": True}
    assert ablate([str(grid), "latent=gumbel,none", "noise=0.5,0"], output=str(output), **settings)
    assert read_results(output) == read_results(uninterrupted)
    assert not list(output.rglob("*.ckpt"))
    assert list(uninterrupted.rglob("*.ckpt")), "they stay unless the command says otherwise"
    logs = [(cell / "log.txt").read_text() for cell in (output / "cells").iterdir()]
    computed = [line for log in logs for line in log.splitlines() if "computed in" in line]
    assert len(computed) == 3  # once per stage: cells that run at the same time wait for each other


def test_cell_equals_plain_fit(uninterrupted: Path, tmp_path: Path) -> None:
    """Compare the last of four cells with `fit` in a new process with the same number of threads."""
    cell = uninterrupted / "cells" / "latent=gumbel,noise=0.5,seed=1"
    fit = ["fit", *record(cell)["arguments"], f"--trainer.default_root_dir={tmp_path}"]
    process = forked_command(*fit, log=tmp_path / "log")
    assert process.wait() == 0, process.errors
    weights, expected = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (tmp_path / "version_0", cell / "run")
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_ablate_continues_after_failed_cell(
    grid: Path, uninterrupted: Path, read_results: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    output, broken = grid.parent / "out", grid.parent / "cache" / "broken.yaml"
    content = yaml.safe_load(grid.read_text())
    content["axes"]["latent"]["gumbel"] = [f"--latent={broken}"]
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    settings: dict[str, Any] = {"output": str(output), "threads": 1}
    grid_arguments = [str(grid), "noise=0.5"]
    broken.parent.mkdir()
    broken.write_text("class_path: lpc_lightning.latent.GumbelSpace\ninit_args: {num_codes: 0}\n")
    assert not ablate(grid_arguments, **settings)
    failed = record(output / "cells" / "latent=gumbel,noise=0.5,seed=1")
    assert failed["status"] == "failed"
    assert "codes" in failed["error"]
    assert failed["error"].splitlines()[-1] in capsys.readouterr().out
    assert set(read_results(output)) == {"latent=none,noise=0.5,seed=1"}

    assert not ablate(grid_arguments, **settings)
    assert "0 cells to run" in capsys.readouterr().out
    assert not ablate(grid_arguments, **settings, retry_failed=True)
    assert record(output / "cells" / "latent=gumbel,noise=0.5,seed=1")["attempts"] == 2

    broken.write_text("class_path: lpc_lightning.latent.GumbelSpace\ninit_args: {num_codes: 4}\n")
    assert ablate(grid_arguments, **settings)  # the file has changed: the cell runs again without --retry-failed
    assert record(output / "cells" / "latent=gumbel,noise=0.5,seed=1")["attempts"] == 1
    expected = read_results(uninterrupted)
    assert read_results(output) == {name: expected[name] for name in read_results(output)}


def test_cell_of_data_without_a_test_split(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is not tested. A test split that a setting names and that is absent ends the cell before its fit."""
    rows = [{"prompt": f"Q{number}", "chosen": "yes", "rejected": "no"} for number in range(8)]
    path, output = grid.parent / "pairs.json", grid.parent / "out"
    path.write_text(json.dumps({"train": rows[:6], "validation": rows[6:]}))
    content = yaml.safe_load(grid.read_text())
    base = [argument for argument in content["base"] if not argument.endswith("_pairs=4")]
    base = [argument for argument in base if "train_pairs" not in argument]
    base[base.index("--data=SyntheticPreferences")] = "--data=PreferenceData"
    base.append(f"--data.path={path}")
    for name, extra in (("default", []), ("named", ["--data.test_split=tset"])):
        grid.write_text(yaml.safe_dump({**content, "base": base + extra}, sort_keys=False))
        finished = ablate([str(grid), "latent=none", "noise=0"], output=str(output / name), threads=1)
        assert finished == (name == "default")
    (cell,) = (output / "default" / "cells").iterdir()
    metrics = json.loads((cell / "results.json").read_text())["metrics"]
    assert "val/rewards/accuracies" in metrics
    assert not [metric for metric in metrics if metric.startswith("test/")]
    (cell,) = (output / "named" / "cells").iterdir()
    assert "has no split 'tset'. It has: train, validation" in record(cell)["error"]
    assert not list(cell.rglob("*.ckpt"))
    assert "train/loss" not in (cell / "log.txt").read_text()


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (ConfigError("policy.path: found x.\nExpected y."), "policy.path: found x. Expected y."),
        (RuntimeError("first\n\n  second"), "RuntimeError: first second"),
        (OSError(28, "No space left on device", "file"), f"file: No space left on device. {SPACE}"),
    ],
)
def test_cause_of_failed_cell_is_last_line(fault: Exception, cause: str, tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    folder.log.write_text("before\n")
    lines = log_fault(fault, folder).splitlines()
    assert lines == ["before", cause]


def test_cause_of_refused_arguments_is_last_line(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path)
    folder.log.write_text("usage: fit ...\nerror: found --sed,\nexpected --seed\n")
    lines = log_fault(SystemExit(2), folder).splitlines()
    assert lines[-1] == "found --sed, expected --seed"


def test_join_metrics_of_many_attempts(tmp_path: Path) -> None:
    """Twelve attempts of 15 steps, each from the tenth step of the one before. Every step is in the file once."""
    folder = CellFolder(tmp_path)
    for attempt in range(12):
        folder.run.mkdir(exist_ok=True)
        rows = [f"{10 * attempt + step},{attempt}" for step in range(15)]
        (folder.run / "metrics.csv").write_text("\n".join(["step,train/loss", *rows, ""]))
        if attempt < 11:
            folder.prepare_fit(tmp_path / "last.ckpt")
    folder.join_metrics()
    with (folder.run / "metrics.csv").open() as file:
        joined = [(int(row["step"]), int(row["train/loss"])) for row in csv.DictReader(file)]
    assert joined == [(step, min(step // 10, 11)) for step in range(125)]


def tune_learning_rate(grid: Path, values: list[float], **tune: str) -> None:
    """Write a grid that tunes the learning rate under seed 7. The result has seed 1."""
    content = yaml.safe_load(grid.read_text())
    content["base"] = [argument for argument in content["base"] if ".optimizer." not in argument]
    content["axes"] |= {"lr": {"key": "model.optimizer.lr"}, "seed": {"values": [1], "key": "seed_everything"}}
    content["tune"] = {"axis": "lr", "values": list(map(str, values)), "seeds": [7], "widen": 0, **tune}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))


def test_ablate_tunes_a_learning_rate(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate of 1e-9 learns nothing. One of 1e-2 lowers the training loss, and with it that of the same pairs."""
    output = grid.parent / "out"
    tune_learning_rate(grid, [1e-9, 1e-2], by="val/loss", mode="min")
    assert ablate([str(grid), "latent=none", "noise=0"], output=str(output), threads=1)
    scores = {
        rate: json.loads((output / f"tuning/latent=none,noise=0,lr={rate},seed=7/results.json").read_text())["metrics"]
        for rate in ("1e-09", "0.01")
    }
    best = min(scores, key=lambda rate: scores[rate]["val/loss"])
    assert not [name for metrics in scores.values() for name in metrics if name.startswith("test/")]
    assert not list(output.glob("tuning/*/pairs_test.jsonl"))
    (cell,) = (output / "cells").iterdir()
    assert cell.name == "latent=none,noise=0,seed=1"
    assert (cell / "pairs_test.jsonl").is_file()
    assert record(cell)["tuned"] == {"lr": float(best)}
    assert record(cell)["arguments"][-1] == f"--model.optimizer.lr={best}"
    assert f"latent=none, noise=0: {float(best)} (the " in capsys.readouterr().out
    report([str(output)], out=str(grid.parent / "report"))
    with (grid.parent / "report" / "tuning.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["value"], row["seed"], float(row["score"])) for row in rows] == [
        (str(float(rate)), "7", scores[rate]["val/loss"]) for rate in scores
    ]
    assert [row["is_chosen"] for row in rows] == [str(rate == best) for rate in scores]
    with (grid.parent / "report" / "means.csv").open() as file:
        assert [row["metric"] for row in csv.DictReader(file)] == ["test/rewards/accuracies"]
    with (grid.parent / "report" / "runs.csv").open() as file:
        assert [row["lr"] for row in csv.DictReader(file)] == [str(float(best))]


@pytest.mark.parametrize("processes", [1, 2])
def test_misspelt_metric_ends_after_first_cell(grid: Path, processes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """A second cell that runs beside the first one may end as well. Cells that wait do not start."""
    output = grid.parent / "out"
    tune_learning_rate(grid, [1e-4, 1e-3, 1e-2, 1e-1], by="val/accuracies")
    with pytest.raises(ConfigError, match=r"tune\.by: found val/accuracies, which .* expected one of .*val/loss"):
        ablate([str(grid), "latent=none", "noise=0"], output=str(output), processes=processes, threads=1)
    records = [record(cell) for cell in (output / "tuning").iterdir()]
    assert len(records) == processes
    assert {each["status"] for each in records} <= {"finished", "stopped"}
    # The finished cells serve the mended grid.
    finished = sum(each["status"] == "finished" for each in records)
    tune_learning_rate(grid, [1e-4, 1e-3, 1e-2, 1e-1], by="val/loss", mode="min")
    capsys.readouterr()
    assert ablate([str(grid), "latent=none", "noise=0"], output=str(output), threads=1)
    assert f"{4 - finished} cells to run in {output / 'tuning'}" in capsys.readouterr().out


def test_ablate_weights_of_best_checkpoint(grid: Path) -> None:
    output = grid.parent / "out"
    content = yaml.safe_load(grid.read_text())
    content["base"][content["base"].index("--callbacks.save_last=true")] = (
        "--callbacks.monitor=train/rewards/accuracies"
    )
    content["base"].append("--callbacks.mode=min")
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    actual = {}
    for weights in ("last", "best"):
        folder = output / weights
        assert ablate(
            [str(grid), "latent=none", "noise=0"], output=str(folder), threads=1, weights=cast(Weights, weights)
        )
        (path,) = folder.glob("cells/*/results.json")
        actual[weights] = json.loads(path.read_text())
    assert actual["best"]["step"] == actual["last"]["step"] == 24
    assert actual["best"]["metrics"]["val/loss"] != actual["last"]["metrics"]["val/loss"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"processes": 0}, "processes: found 0"), ({"cell": 4}, "cell: found 4, expected a number from 0 to 3")],
)
def test_ablate_rejects_invalid_settings(grid: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ablate([str(grid)], output=str(grid.parent / "out"), **settings)  # type: ignore[arg-type]


def test_ablate_rejects_folder_of_another_grid(uninterrupted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("base: []\naxes: {rate: {values: [1], key: model.beta}}")
    with pytest.raises(ConfigError, match=r"found a grid over latent, noise, seed in .*expected one over rate"):
        ablate([str(other)], output=str(uninterrupted))


def test_slurm_script_runs_one_cell(
    grid: Path, uninterrupted: Path, read_results: Read, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    main(["ablate", str(grid), f"--output={output}", "--print-array"])
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%16" in script
    programs = tmp_path / "bin"
    programs.mkdir()
    # The script's command runs in this process: the imports take seconds.
    (programs / "lpc-lightning").write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path / "arguments"}\n')
    (programs / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    completed = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    main([*(tmp_path / "arguments").read_text().split("\0")[:-1], "--threads=1"])
    name = "latent=gumbel,noise=0.5,seed=1"
    assert read_results(output) == {name: read_results(uninterrupted)[name]}
    main(["ablate", str(grid), f"--output={output}", "--print-array"])
    assert "#SBATCH --array=0-2%16" in capsys.readouterr().out


def test_metrics_have_a_row_per_step(uninterrupted: Path) -> None:
    with (uninterrupted / "cells" / "latent=none,noise=0,seed=1" / "run" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(24))


def test_cell_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text(json.dumps({"axes": {}, "arguments": ["--trainer.max_steps=1"]}))
    with pytest.raises(ConfigError, match=r"cell\.json: found no entry `places`, .*Remove its folder"):
        CellFolder(tmp_path).record()
