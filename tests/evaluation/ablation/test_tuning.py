"""Tests of tuned grids with a function of (value, seed) in place of training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from math import log, nan
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation import plan as plan_module
from lpc_lightning.evaluation.ablation.cells.folder import CellFolder
from lpc_lightning.evaluation.ablation.command import ablate
from lpc_lightning.evaluation.ablation.grids.grid import Grid
from lpc_lightning.evaluation.ablation.overview import write_overview
from lpc_lightning.evaluation.ablation.plan import Plan, PlannedCell
from lpc_lightning.evaluation.ablation.stages import Stages
from lpc_lightning.evaluation.report.runs.ablation import load_ablation
from lpc_lightning.evaluation.report.runs.tuning import read_tunings
from lpc_lightning.files.json_files import write_json
from tests.fixtures.tuned_grid import AXES, BY, LR, TUNE

Score = Callable[[str, float, int], float | str]
"""The stand-in for a fit: latent, value and seed give a score, or the error of a failed cell."""


@pytest.fixture(autouse=True)
def arguments_as_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without code and files, whose fingerprints have tests of their own."""
    monkeypatch.setattr(plan_module, "cell_fingerprint", lambda arguments, *_: " ".join(arguments))


def optimum(**best: float) -> Score:
    """Return a score that falls with the distance of the value's logarithm to the best one. Seeds shift all values."""
    return lambda latent, value, seed: 0.9 - log(value / best[latent]) ** 2 / 100 + seed / 1e4


class Engine:
    """Runs the stages of a grid in a folder, with a score in place of fits. It may be killed after some cells."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.started: list[str] = []
        self.ended: list[int] = []
        """By stage: the number of cells that have ended before, for the message."""

    def __call__(self, grid: Grid, score: Score, kill_after: int | None = None, **settings: Any) -> Plan:
        def run(cells: Sequence[PlannedCell], ended: int) -> None:
            self.ended.append(ended)
            for cell in cells:
                if kill_after is not None and len(self.started) >= kill_after:
                    raise KeyboardInterrupt
                self.started.append(cell.folder.path.name)
                fit(cell, score)

        write_overview(self.output, grid, "ablate")
        return Stages(self.output, grid, "last", **settings).run(run)

    def choices(self) -> dict[str, float | None]:
        """Return the chosen values by latent, from `tuning.json`."""
        groups = json.loads((self.output / "tuning.json").read_text())["groups"]
        return {group["axes"]["latent"]: group["value"] for group in groups}

    def notes(self) -> dict[str, str]:
        groups = json.loads((self.output / "tuning.json").read_text())["groups"]
        return {group["axes"]["latent"]: group["note"] for group in groups}

    def names(self, folder: str) -> set[str]:
        return {path.name for path in (self.output / folder).iterdir()} if (self.output / folder).exists() else set()


def fit(cell: PlannedCell, score: Score) -> None:
    """Write the files that a fit leaves, with a score in place of its metric."""
    record = cell.folder.begin(cell.new_record)
    arguments = dict(argument.removeprefix("--").split("=") for argument in record.arguments)
    result = score(str(record.axes["latent"]), float(arguments[LR]), int(arguments["seed_everything"]))
    if isinstance(result, str):
        record = replace(record, status="failed", error=result, diverged=result == "nan")
    else:
        metrics = {BY: result if result == result else None, "val/loss": -result}
        write_json(cell.folder.results, {"metrics": metrics})
        record = replace(record, status="finished")
    cell.folder.write(record)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path / "out")


def test_tuner_finds_known_best_value(read: Callable[..., Grid], engine: Engine) -> None:
    plan = engine(read(), optimum(none=1e-3, marginal=3e-4))
    assert engine.choices() == {"none": 1e-3, "marginal": 3e-4}
    assert plan.is_complete
    # Every arm has the same values and seeds. The result has other seeds and no value of the tuned axis in its axes.
    assert engine.names("tuning") == {
        f"latent={latent},lr={json.dumps(value)},seed={seed}"
        for latent in ("none", "marginal")
        for value in TUNE["values"]
        for seed in (101, 102)
    }
    assert engine.names("cells") == {f"latent={latent},seed={seed}" for latent in AXES["latent"] for seed in (1, 2, 3)}
    for cell in (engine.output / "cells").iterdir():
        record = CellFolder(cell).record()
        assert record is not None
        chosen = engine.choices()[record.axes["latent"]]
        assert record.tuned == {"lr": chosen}
        assert record.arguments[-1] == f"--{LR}={json.dumps(chosen)}"
    assert len(engine.started) == len(set(engine.started)) == 16 + 6


def test_arguments_of_tune_reach_tuning_cells_only(read: Callable[..., Grid], engine: Engine) -> None:
    share = "--trainer.limit_train_batches=0.25"
    engine(read({"arguments": [share]}), optimum(none=1e-3, marginal=3e-4))
    for folder in ("tuning", "cells"):
        for cell in (engine.output / folder).iterdir():
            record = CellFolder(cell).record()
            assert record is not None
            assert (share in record.arguments) == (folder == "tuning")
    (tuning, *_) = read_tunings(engine.output)
    assert tuning.section.endswith(f"widened at most 2 times, with {share}")


def test_tuner_minimizes(read: Callable[..., Grid], engine: Engine) -> None:
    engine(read({"by": "val/loss", "mode": "min"}), optimum(none=3e-4, marginal=1e-3))
    assert engine.choices() == {"none": 3e-4, "marginal": 1e-3}


def test_tuner_takes_mean_over_seeds(read: Callable[..., Grid], engine: Engine) -> None:
    """At 3e-4 one seed is best of all and the other is bad; 1e-3 is best on average."""
    scores = {(3e-4, 101): 0.99, (3e-4, 102): 0.5, (1e-3, 101): 0.8, (1e-3, 102): 0.8}
    engine(read(), lambda latent, value, seed: scores.get((value, seed), 0.6))
    assert engine.choices() == {"none": 1e-3, "marginal": 1e-3}


def test_tuner_widens_at_an_edge(read: Callable[..., Grid], engine: Engine) -> None:
    """The values are widened for all arms alike, by the ratio of the last two values."""
    engine(read(), optimum(none=9e-3, marginal=3e-4))
    assert engine.choices() == {"none": 9e-3, "marginal": 3e-4}
    groups = json.loads((engine.output / "tuning.json").read_text())["groups"]
    # 9e-3 is best, but only 27e-3 shows that it is not an edge.
    tried = [[(entry["value"], entry["added"]) for entry in group["values"]] for group in groups]
    assert tried == [[*((value, False) for value in TUNE["values"]), (9e-3, True), (27e-3, True)]] * 2
    assert set(engine.notes().values()) == {""}


def test_tuner_widens_at_both_edges(read: Callable[..., Grid], engine: Engine) -> None:
    engine(read({"values": [1e-3, 3e-3], "widen": 1}), optimum(none=1e-3, marginal=9e-3))
    assert engine.choices() == {"none": 1e-3, "marginal": 9e-3}
    assert {name.split(",")[1] for name in engine.names("tuning")} == {"lr=0.00033", "lr=0.001", "lr=0.003", "lr=0.009"}


@pytest.mark.parametrize(
    ("values", "best", "tried"),
    [
        ([1, 2, 4], 16, [1, 2, 4, 8, 16]),
        ([64, 256], 1024, [64, 256, 1024, 4096]),
        ([100, 101], 102, [100, 101, 102, 103]),
        ([1, 2, 4], 1, [1, 2, 4]),  # half a step is none
        ([2, 3], 2, [1, 2, 3]),
        ([0.1, 0.101], 1.0, [0.1, 0.101]),  # two digits leave 0.1
    ],
)
def test_added_values_stay_what_values_are(
    read: Callable[..., Grid], engine: Engine, values: list[float], best: float, tried: list[float]
) -> None:
    """Integers are widened by integers, and no value is tried twice."""
    engine(read({"values": values}), optimum(none=best, marginal=best))
    assert sorted(engine.names("tuning")) == sorted(
        f"latent={latent},lr={value},seed={seed}"
        for latent in AXES["latent"]
        for value in tried
        for seed in TUNE["seeds"]
    )
    assert len(engine.started) == len(set(engine.started))


def test_tuner_stops_at_limit_and_says_so(read: Callable[..., Grid], engine: Engine) -> None:
    plan = engine(read(), optimum(none=1.0, marginal=1e-3))
    assert engine.choices() == {"none": 27e-3, "marginal": 1e-3}
    assert engine.notes()["none"] == "the largest value that was tried, so that the best one may be beyond it"
    assert engine.notes()["marginal"] == ""
    assert plan.is_complete


@pytest.mark.parametrize(
    ("best", "chosen"), [([1e-4, 3e-4], 3e-4), ([1e-4, 3e-3], 1e-4), ([3e-4, 1e-3], 3e-4), ([1e-4, 1e-3, 3e-3], 1e-3)]
)
def test_tied_values(read: Callable[..., Grid], engine: Engine, best: list[float], chosen: float) -> None:
    """The value nearest to the middle counts; of two that are equally near, the smaller one. Means tie, not seeds."""

    def score(latent: str, value: float, seed: int) -> float:
        return (0.7 if (seed == 101) == (value == best[0]) else 0.8) if value in best else 0.6

    engine(read({"widen": 0}), score)
    assert engine.choices() == {"none": chosen, "marginal": chosen}


def test_failed_tuning_cell_blocks_its_arm(read: Callable[..., Grid], engine: Engine) -> None:
    good = optimum(none=1e-3, marginal=3e-4)
    failing = ("none", 3e-3, 102)
    plan = engine(read(), lambda *cell: "OSError: disk full" if cell == failing else good(*cell))
    assert engine.choices() == {"none": None, "marginal": 3e-4}
    cause = "no value is chosen and no result is run, because latent=none,lr=0.003,seed=102 failed"
    assert engine.notes()["none"] == cause
    assert not plan.is_complete
    assert engine.names("cells") == {f"latent=marginal,seed={seed}" for seed in (1, 2, 3)}

    engine.started.clear()
    engine(read(), good)
    assert engine.started == []
    plan = engine(read(), good, retry_failed=True)
    assert engine.started == ["latent=none,lr=0.003,seed=102", *(f"latent=none,seed={seed}" for seed in (1, 2, 3))]
    assert engine.choices() == {"none": 1e-3, "marginal": 3e-4}
    assert plan.is_complete


def test_tuning_settles_before_results_run(read: Callable[..., Grid], engine: Engine) -> None:
    """A cell that failed in tuning is at an edge when it runs again: the wider range changes the choice of all arms."""
    failing = ("none", 3e-3, 102)

    def good(latent: str, value: float, seed: int) -> float:
        return value if latent == "none" or value > 3e-3 else -(log(value / 1e-3) ** 2)

    with pytest.raises(KeyboardInterrupt):  # after the first result of the other arm
        engine(read(), lambda *cell: "OSError: disk full" if cell == failing else good(*cell), kill_after=17)
    assert engine.started[-1] == "latent=marginal,seed=1"
    engine.started.clear()
    engine.ended.clear()
    stages = Stages(engine.output, read(), "last", retry_failed=True)
    plan = engine(read(), good, retry_failed=True)
    assert engine.ended[0] == 15 + 1, "the other tuning cells and a result; the two other results of the arm wait"
    ran = [name for name in engine.started if "lr=" not in name]
    assert engine.started[0] == "latent=none,lr=0.003,seed=102"
    assert sorted(ran) == sorted(f"latent={latent},seed={seed}" for latent in AXES["latent"] for seed in (1, 2, 3))
    assert engine.started[-6:] == ran, "after all tuning cells"
    assert all(map(stages.is_finished, plan.cells))
    chosen = engine.choices()["marginal"]
    assert chosen is not None
    assert chosen > 3e-3
    old = next(cell for cell in plan.cells if cell.folder.path.name == "latent=marginal,seed=1")
    old.folder.write(replace(old.new_record, fingerprint="at another value", status="finished"))
    assert not stages.is_finished(old)


@pytest.mark.parametrize("outcome", ["nan", nan])
def test_diverged_value_is_not_chosen(read: Callable[..., Grid], engine: Engine, outcome: float | str) -> None:
    """The value is tried, so that the one below it is not at an edge."""
    good = optimum(none=3e-3, marginal=3e-4)
    plan = engine(read(), lambda *cell: outcome if cell == ("none", 3e-3, 102) else good(*cell))
    assert engine.choices() == {"none": 1e-3, "marginal": 3e-4}
    assert engine.notes()["none"] == "diverged: latent=none,lr=0.003,seed=102"
    assert plan.is_complete
    assert not any("lr=0.009" in name for name in engine.names("tuning"))


def test_all_values_diverged(read: Callable[..., Grid], engine: Engine) -> None:
    plan = engine(read(), lambda latent, value, seed: nan if latent == "none" else 0.5)
    assert engine.choices()["none"] is None
    assert "all values diverged" in engine.notes()["none"]
    assert not plan.is_complete


@pytest.mark.parametrize("kill_after", [0, 1, 15, 16, 18, 24, 25])
def test_killed_tuning_resumes(read: Callable[..., Grid], engine: Engine, kill_after: int) -> None:
    """Killed before, within and after the tuning, its widening and the result: no cell runs twice."""
    score = optimum(none=3e-3, marginal=3e-4)
    with pytest.raises(KeyboardInterrupt):
        engine(read(), score, kill_after)
    plan = engine(read(), score)
    uninterrupted = Engine(engine.output.with_name("other"))
    assert [cell.folder.path.name for cell in uninterrupted(read(), score).cells] == [
        cell.folder.path.name for cell in plan.cells
    ]
    assert sorted(engine.started) == sorted(uninterrupted.started)
    assert (engine.output / "tuning.json").read_bytes() == (uninterrupted.output / "tuning.json").read_bytes()


def test_numbers_of_cells_do_not_change(read: Callable[..., Grid], engine: Engine) -> None:
    """A Slurm task selects a cell by its number, while other tasks add cells."""
    numbers: dict[int, str] = {}
    for after in range(0, 30, 5):
        with pytest.raises(KeyboardInterrupt):
            engine(read(), optimum(none=3e-3, marginal=3e-4), after)
        plan = Stages(engine.output, read(), "last").plan()
        names = {cell.number: cell.folder.path.name for cell in plan.cells}
        assert numbers.items() <= names.items()
        assert list(names) == list(range(len(names)))
        numbers = names


def test_slurm_array_has_the_next_stage(
    read: Callable[..., Grid], engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, score = read(), optimum(none=1e-3, marginal=3e-4)
    for after, cells in ((None, "0-15"), (3, "3-15"), (16, "16-21")):
        if after is not None:
            with pytest.raises(KeyboardInterrupt):
                engine(grid, score, after)
        capsys.readouterr()
        assert ablate([str(tmp_path / "grid.yaml")], output=str(engine.output), print_array=True)
        assert f"#SBATCH --array={cells}%16" in capsys.readouterr().out
    engine(grid, score)
    capsys.readouterr()
    assert ablate([str(tmp_path / "grid.yaml")], output=str(engine.output), print_array=True)
    assert capsys.readouterr() == ("", "No cell is left to run, so there is no array to submit.\n")


def test_slurm_tasks_run_what_the_array_lists(
    read: Callable[..., Grid], engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the tasks has every setting that decides which cells run and how."""
    engine(read().with_changes(["latent=none", "lr=1e-3"]), lambda *cell: "OSError: no memory")
    settings: dict[str, Any] = {"weights": "best", "threads": 3}
    settings |= {"retry_failed": True, "keep_stale": True, "remove_checkpoints": True}
    local = {"processes", "launcher", "cpus", "gpus", "retries", "cell", "print_array"}
    assert {"grid", "output", *settings} | local == set(signature(ablate).parameters)

    changes = ["latent=none", "lr=1e-3"]
    assert ablate([str(tmp_path / "grid.yaml"), *changes], output=str(engine.output), print_array=True, **settings)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("srun"))
    assert shlex.split(line)[1:-2] == [
        *("lpc-lightning", "ablate", str(tmp_path / "grid.yaml"), *changes, f"--output={engine.output}"),
        *("--weights=best", "--threads=3", "--retry_failed", "--keep_stale", "--remove_checkpoints"),
    ]


def test_changed_section_changes_choices(read: Callable[..., Grid], engine: Engine) -> None:
    def score(latent: str, value: float, seed: int) -> float:
        return optimum(none=3e-4, marginal=3e-4)(latent, value, seed) if seed != 103 else 0.5 + (value == 1e-3)

    engine(read(), score)
    engine.started.clear()
    engine(read({"values": [1e-4, 3e-4, 5e-4, 1e-3]}), score)
    assert engine.started == [
        f"latent={latent},lr=0.0005,seed={seed}" for latent in AXES["latent"] for seed in (101, 102)
    ]

    engine.started.clear()
    engine(read({"seeds": [103]}), score)
    assert engine.choices() == {"none": 1e-3, "marginal": 1e-3}
    assert {name for name in engine.started if "lr" not in name} == engine.names("cells")  # they run at the new value


def test_change_of_latent_keeps_other_choices(read: Callable[..., Grid], engine: Engine) -> None:
    score = optimum(none=1e-3, marginal=3e-4)
    engine(read().with_changes(["latent=none"]), score)
    engine(read().with_changes(["latent=marginal"]), score)
    assert engine.choices() == {"none": 1e-3, "marginal": 3e-4}


def test_single_value_is_not_tuned(read: Callable[..., Grid], engine: Engine) -> None:
    plan = engine(read().with_changes(["lr=5e-4"]), optimum(none=1e-3, marginal=3e-4))
    assert plan.is_complete
    assert engine.names("tuning") == set()
    records = [CellFolder(cell).record() for cell in (engine.output / "cells").iterdir()]
    assert [record.tuned for record in records if record] == [{"lr": 5e-4}] * 6


def test_value_set_by_hand_is_not_tuned(read: Callable[..., Grid], engine: Engine) -> None:
    """A report separates an arm that ran again at another value than the chosen one."""
    score = optimum(none=3e-4, marginal=3e-4)
    engine(read(), score)
    engine(read().with_changes(["latent=marginal", "lr=1e-3"]), score)
    for cell in (engine.output / "cells").iterdir():
        (cell / "run").mkdir()
        (cell / "run" / "config.yaml").write_text("seed_everything: 1")
    records = load_ablation(engine.output).records
    sections = {(record.axes["latent"], record.tuned["lr"]): record.settings["tune"] for record in records}
    assert sections == {("none", 3e-4): next(read_tunings(engine.output)).section, ("marginal", 1e-3): "none"}


def test_metric_that_is_not_logged(read: Callable[..., Grid], engine: Engine) -> None:
    with pytest.raises(
        ConfigError, match=r"tune.by: found val/acc, which .* not logged, expected one of val/loss, val/r"
    ):
        engine(read({"by": "val/acc"}), optimum(none=1e-3, marginal=1e-3))


def test_seed_of_results_is_no_tuning_seed(read: Callable[..., Grid], engine: Engine) -> None:
    with pytest.raises(
        ConfigError, match=r"tune\.seeds: found 101, which the axis seed also has, expected other seeds"
    ):
        read().with_changes(["seed=1,101"])
    with pytest.raises(ConfigError, match="found 2, which the axis seed also has"):
        read({"seeds": [2, 101]})
    engine(read(), optimum(none=1e-3, marginal=1e-3))
    with pytest.raises(ConfigError, match=r"seed: found 101, which tuned the results in .*out, expected other seeds"):
        engine(read({"seeds": [111]}, axes=AXES | {"seed": AXES["seed"] | {"values": [1, 101]}}), optimum(none=1e-3))
    one = {"values": [1], "key": "seed_everything"}
    with pytest.raises(ConfigError, match=r"tune\.seeds: found 3, which the results in .*out have"):
        engine(read({"seeds": [3, 4]}, axes=AXES | {"seed": one}), optimum(none=1e-3, marginal=1e-3))
