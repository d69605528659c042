"""Whole ablations: real fits, run again, taken up, and gone wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation import fingerprint
from lpc_lightning.evaluation.ablation.command import ablate, main
from lpc_lightning.evaluation.ablation.folder import Weights

Read = Callable[[Path], dict[str, bytes]]


def record(cell: Path) -> dict[str, Any]:
    return json.loads((cell / "cell.json").read_text())


def test_every_cell_leaves_its_run_its_record_and_its_results(uninterrupted: Path) -> None:
    cells = sorted((uninterrupted / "cells").iterdir())
    assert {cell.name for cell in cells} == {
        f"latent={latent},noise={noise},seed=1" for latent in ("gumbel", "none") for noise in ("0.5", "0")
    }
    for cell in cells:
        told, results = record(cell), json.loads((cell / "results.json").read_text())
        assert (told["status"], told["error"], told["attempts"], told["seed"]) == ("finished", None, 1, 1)
        assert told["seconds"] > 0
        assert told["peak_bytes"] > 2**26
        assert results["axes"] == told["axes"]
        assert results["step"] == 24
        assert 0 <= results["metrics"]["val/rewards/accuracies"] <= 1
        assert 0 <= results["metrics"]["test/rewards/accuracies"] <= 1
        assert results["parameters"]["policy"] > 0
        assert (results["parameters"]["latent"] > 0) == (told["axes"]["latent"] == "gumbel")
        noise = json.loads((cell / "run" / "label_noise.json").read_text())
        assert noise["rate"] == told["axes"]["noise"]
        assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in (cell / "run").iterdir()}
    overview = json.loads((uninterrupted / "ablation.json").read_text())
    assert overview["name"] == "small"
    assert overview["axes"] == {"latent": ["none", "gumbel"], "noise": [0, 0.5], "seed": [1]}
    assert overview["command"].startswith("lpc-lightning ablate ")


def test_what_cells_share_is_worked_out_once(uninterrupted: Path) -> None:
    logs = [(cell / "log.txt").read_text() for cell in (uninterrupted / "cells").iterdir()]
    lines = [line for log in logs for line in log.splitlines() if "reference log-probabilities" in line]
    for stage in ("train", "validation", "test"):
        computed = [line for line in lines if line.startswith(f"{stage}:") and "computed in" in line]
        assert len(computed) == 1, computed


def test_finished_cells_are_left_alone(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "cells").rglob("*")}
    assert ablate([str(uninterrupted.parent / "small.yaml")], output=str(uninterrupted), threads=1)
    assert {path: path.stat().st_mtime_ns for path in (uninterrupted / "cells").rglob("*")} == before
    said = capsys.readouterr().out
    assert "0 cells to run" in said
    assert "4 skipped" in said
    assert "lpc-lightning report" in said


def test_neither_order_nor_company_changes_a_cell(uninterrupted: Path, grid: Path, read_results: Read) -> None:
    output = grid.parent / "out"
    assert ablate([str(grid), "latent=gumbel,none", "noise=0.5,0"], output=str(output), processes=2, threads=1)
    assert read_results(output) == read_results(uninterrupted)
    logs = [(cell / "log.txt").read_text() for cell in (output / "cells").iterdir()]
    computed = [line for log in logs for line in log.splitlines() if "computed in" in line]
    assert len(computed) == 3  # for training, validation and test: cells side by side wait for one another


def test_a_cell_is_what_fit_makes_of_its_arguments(uninterrupted: Path, tmp_path: Path) -> None:
    """In a fresh process with as many threads, and of the last of four cells that ran one after the other."""
    cell = uninterrupted / "cells" / "latent=gumbel,noise=0.5,seed=1"
    fit = [sys.executable, "-m", "lpc_lightning", "fit", *record(cell)["arguments"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*fit, f"--trainer.default_root_dir={tmp_path}"], check=True, capture_output=True, env=environment)
    weights, expected = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (tmp_path / "version_0", cell / "run")
    )
    assert all(torch.equal(weights[each], expected[each]) for each in expected)


def test_a_cell_that_fails_is_told_and_the_others_go_on(
    grid: Path, uninterrupted: Path, read_results: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    output, broken = grid.parent / "out", grid.parent / "cache" / "broken.yaml"
    told = yaml.safe_load(grid.read_text())
    told["axes"]["latent"]["gumbel"] = [f"--latent={broken}"]
    grid.write_text(yaml.safe_dump(told, sort_keys=False))
    command: dict[str, Any] = {"output": str(output), "threads": 1}
    wanted = [str(grid), "noise=0.5"]
    broken.parent.mkdir()
    broken.write_text("class_path: lpc_lightning.latent.GumbelSpace\ninit_args: {num_codes: 0}\n")
    assert not ablate(wanted, **command)
    failed = record(output / "cells" / "latent=gumbel,noise=0.5,seed=1")
    assert failed["status"] == "failed"
    assert "codes" in failed["error"]
    assert failed["error"].splitlines()[-1] in capsys.readouterr().out
    assert set(read_results(output)) == {"latent=none,noise=0.5,seed=1"}

    assert not ablate(wanted, **command)
    assert "0 cells to run" in capsys.readouterr().out
    assert not ablate(wanted, **command, retry_failed=True)
    assert record(output / "cells" / "latent=gumbel,noise=0.5,seed=1")["attempts"] == 2

    fingerprint._describe_file.cache_clear()
    broken.write_text("class_path: lpc_lightning.latent.GumbelSpace\ninit_args: {num_codes: 4}\n")
    assert ablate(wanted, **command)  # another file: run anew without being asked
    assert record(output / "cells" / "latent=gumbel,noise=0.5,seed=1")["attempts"] == 1
    expected = read_results(uninterrupted)
    assert read_results(output) == {name: expected[name] for name in read_results(output)}


def test_best_weights_are_those_of_the_best_checkpoint(grid: Path) -> None:
    output = grid.parent / "out"
    told = yaml.safe_load(grid.read_text())
    told["base"][told["base"].index("--callbacks.save_last=true")] = "--callbacks.monitor=train/rewards/accuracies"
    told["base"].append("--callbacks.mode=min")
    grid.write_text(yaml.safe_dump(told, sort_keys=False))
    found = {}
    for weights in ("last", "best"):
        folder = output / weights
        assert ablate(
            [str(grid), "latent=none", "noise=0"], output=str(folder), threads=1, weights=cast(Weights, weights)
        )
        (path,) = folder.glob("cells/*/results.json")
        found[weights] = json.loads(path.read_text())
    assert found["best"]["step"] == found["last"]["step"] == 24
    assert found["best"]["metrics"]["val/loss"] != found["last"]["metrics"]["val/loss"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"processes": 0}, "processes: found 0"), ({"cell": 4}, "cell: found 4, expected a number from 0 to 3")],
)
def test_settings_that_mean_nothing_are_told(grid: Path, settings: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ablate([str(grid)], output=str(grid.parent / "out"), **settings)  # type: ignore[arg-type]


def test_another_grid_in_the_same_folder_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("base: []\naxes: {rate: {values: [1], key: model.beta}}")
    with pytest.raises(ConfigError, match=r"found a grid over latent, noise, seed in .*expected one over rate"):
        ablate([str(other)], output=str(uninterrupted))


def test_one_cell_of_an_array_is_run_as_the_script_says(
    grid: Path, uninterrupted: Path, read_results: Read, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    main(["ablate", str(grid), f"--output={output}", "--print-array"])
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-3%16" in script
    programs = tmp_path / "bin"
    programs.mkdir()
    code = ["import sys", "from lpc_lightning.evaluation.ablation.command import main"]
    code += ["if __name__ == '__main__': main(sys.argv[1:])"]
    (programs / "ablate.py").write_text("\n".join(code))
    (programs / "lpc-lightning").write_text(f'#!/bin/sh\nexec {sys.executable} {programs / "ablate.py"} "$@"\n')
    (programs / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}
    script = script.replace('--cell "$SLURM', '--threads 1 --cell "$SLURM')
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name = "latent=gumbel,noise=0.5,seed=1"
    assert read_results(output) == {name: read_results(uninterrupted)[name]}
    main(["ablate", str(grid), f"--output={output}", "--print-array"])
    assert "#SBATCH --array=0-2%16" in capsys.readouterr().out


def test_metrics_of_a_whole_run_have_a_row_for_each_step(uninterrupted: Path) -> None:
    with (uninterrupted / "cells" / "latent=none,noise=0,seed=1" / "run" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(24))
