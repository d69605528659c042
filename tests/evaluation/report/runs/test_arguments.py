"""Tests of the arguments of cells: which settings of arms are compared, on grids with cells in place of fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.evaluation.ablation.grids.grid import Cell, read_grid
from lpc_lightning.evaluation.ablation.overview import write_overview
from lpc_lightning.evaluation.report.contrasts import contrasts
from lpc_lightning.evaluation.report.runs.arguments import place_arguments
from lpc_lightning.evaluation.report.runs.differences import add_axes
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.study import make_study

METRIC = "val/rewards/accuracies"
ARMS = {
    "floor": ["--latent=null"],
    "two_epochs": ["--latent=null", "--trainer.max_epochs=2"],
    "ceiling": ["--latent=null", "--data.columns.named_in_prompt=annotator"],
    "gumbel": ["--latent=configs/latent/gumbel.yaml", "--model.latent_lr=0.01"],
}
SEED = {"values": [1, 2], "arguments": ["--seed_everything={value}", "--callbacks.seed={value}"]}
LR = "--model.optimizer.lr"
BASE = ["--config=base.yaml", "--trainer.precision=32-true", "--callbacks+=lpc.AnnotatorAdaptation"]
Run = Callable[..., Path]


def config(cell: Cell) -> dict[str, Any]:
    """Return the config of a cell, as a fit composes it of its arguments."""
    given = dict(argument.removeprefix("--").split("=", 1) for argument in cell.arguments)
    optimizer = {"class_path": "AdamW", "init_args": {"lr": float(given.get("model.optimizer.lr", "1e-3"))}}
    model = {"optimizer": optimizer, "latent_lr": given.get("model.latent_lr"), "beta": given.get("model.beta", "0.1")}
    space = {"class_path": "GumbelSpace", "init_args": {"num_codes": int(given.get("latent.num_codes", "8"))}}
    callback = {"seed": int(given["callbacks.seed"]), "training_pairs": int(given.get("callbacks.training_pairs", "8"))}
    return {
        "seed_everything": int(given["seed_everything"]),
        "trainer": {
            "max_epochs": int(given.get("trainer.max_epochs", "1")),
            "precision": given.get("trainer.precision"),
        },
        "model": {"class_path": "DPO", "init_args": model},
        "data": {"columns": {"named_in_prompt": given.get("data.columns.named_in_prompt")}},
        "latent": None if given.get("latent", "null") == "null" else space,
        "callbacks": [
            {"class_path": "BestAndLast", "init_args": {"monitor": METRIC}},
            {"class_path": "lpc.AnnotatorAdaptation", "init_args": callback},
        ],
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Function that writes the cells of a grid as `ablate` does, after changes on the command line."""

    def run(folder: str, *changes: str, base: list[str] = BASE, tune: bool = False) -> Path:
        axes: dict[str, Any] = {"arm": ARMS, **({"lr": {"key": LR.removeprefix("--")}} if tune else {}), "seed": SEED}
        content: dict[str, Any] = {"base": base, "axes": axes}
        if tune:
            content["tune"] = {"axis": "lr", "values": [1e-3, 1e-2], "seeds": [101], "by": METRIC}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        grid = read_grid(tmp_path / "grid.yaml").with_changes(changes)
        write_overview(tmp_path / folder, grid, "ablate")
        for cell in grid.cells():
            chosen = grid.at(cell, 1e-2 if cell.axes["arm"] == "gumbel" else 1e-3) if tune else cell
            write_cell(tmp_path / folder / "cells" / cell.name, chosen)
        return tmp_path / folder

    return run


def write_cell(folder: Path, cell: Cell) -> None:
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config(cell), sort_keys=False))
    record = {"axes": dict(cell.axes), "arguments": list(cell.arguments), "tuned": dict(cell.tuned)}
    record["places"] = [placed.place for placed in cell.placed]
    (folder / "cell.json").write_text(json.dumps({**record, "weights": "last", "status": "finished"}))
    (folder / "results.json").write_text(json.dumps({"metrics": {METRIC: 0.5}}))


def added(*folders: Path) -> dict[str, list[Any]]:
    """Return the columns of a report beside the axes, with their values."""
    loaded = load_folders(list(map(str, dict.fromkeys(folders))))
    study = make_study(add_axes(loaded.records), loaded.axes)
    return {name: list(values) for name, values in study.axes.items() if name != "arm"}


def compared(*folders: Path) -> set[str]:
    """Return the arms that a report compares with the first arm of the first folder."""
    loaded = load_folders(list(map(str, dict.fromkeys(folders))))
    study, arm = make_study(add_axes(loaded.records), loaded.axes), loaded.records[0].axes["arm"]
    return {str(contrast.group.axes["arm"]) for contrast in contrasts(study, [METRIC], {"arm": arm})[0]}


THREE = "trainer.max_epochs=3"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (["arm=floor"], ["arm=gumbel"], {}),
        (["arm=floor"], ["arm=two_epochs"], {}),
        (["arm=floor"], ["arm=ceiling,two_epochs"], {}),
        (["arm=floor", THREE], ["arm=gumbel", THREE], {}),
        (["arm=floor"], ["arm=gumbel", THREE], {"trainer.max_epochs": [1, 3]}),
        # The grid declares two epochs beside one, not beside three.
        (["arm=two_epochs"], ["arm=gumbel", THREE], {"trainer.max_epochs": [2, 3]}),
        (
            ["arm=floor"],
            ["arm=gumbel", "data.columns.named_in_prompt=annotator"],
            {"data.columns.named_in_prompt": ["none", "annotator"]},
        ),
        # A change below what the file of an arm sets.
        (["arm=gumbel", "seed=1"], ["arm=gumbel", "seed=2", "latent.num_codes=4"], {"latent.num_codes": [4, 8]}),
        (["arm=floor"], ["arm=gumbel", "latent.num_codes=4"], {}),
        # The seed sets the seed of a callback, not its other settings.
        (
            ["arm=floor", "seed=1"],
            ["arm=gumbel", "seed=2", "callbacks.training_pairs=1"],
            {"callbacks.AnnotatorAdaptation.training_pairs": [1, 8]},
        ),
        (["arm=floor", "seed=1"], ["arm=gumbel", "seed=2"], {}),
        # Another argument of the class that both have.
        (["arm=floor"], ["arm=gumbel", "model.beta=1"], {"model.beta": [0.1, 1]}),
    ],
)
@pytest.mark.parametrize("tune", [False, True])
def test_settings_of_arms_and_of_commands(
    run: Run, first: list[str], second: list[str], expected: dict[str, Any], tune: bool
) -> None:
    folders = run("one", *first, tune=tune), run("two", *second, tune=tune)
    assert {name: values for name, values in added(*folders).items() if len(values) > 1} == expected
    arms = {arm for change in second if change.startswith("arm=") for arm in change[4:].split(",")}
    assert compared(*folders) == (set() if expected else arms)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--callbacks.x=1"], ["callbacks.C.x"]),
        (["--callbacks+=C", "--callbacks.x.y=1"], ["callbacks.C.*", "callbacks.C.x.y"]),
        (["--callbacks+=b.yaml", "--callbacks.x=1", "--callbacks+=lpc.C"], ["callbacks.B-2.*", None, "callbacks.C.*"]),
        (
            ["--callbacks+=b.yaml", "--callbacks.z=1", "--callbacks+=C"],
            ["callbacks.B-2.*", "callbacks.B-2.z", "callbacks.C.*"],
        ),
        # A file that adds several callbacks.
        (["--callbacks+=A", "--callbacks+=b_and_c.yaml"], [None, "callbacks.C.*"]),
        # The list before is gone.
        (["--callbacks+=A", "--callbacks.x=1", "--callbacks=all.yaml"], [None, None, "callbacks.*"]),
        (["--callbacks=all.yaml", "--callbacks+=C"], ["callbacks.*", "callbacks.C.*"]),
        (["--callbacks+=b.yaml"] * 5, [None, "callbacks.A.*", "callbacks.B.*", "callbacks.B-2.*", "callbacks.C.*"]),
    ],
)
def test_arguments_of_callbacks(arguments: list[str], names: list[str | None]) -> None:
    """The run has the callbacks A, B, B and C. Only the second B has `z`, and C has `x`."""
    settings = ["callbacks.A", "callbacks.B", "callbacks.B-2", "callbacks.B-2.z", "callbacks.C", "callbacks.C.x"]
    settings += ["callbacks.C.x.y"]
    cell = {"axes": {"arm": "a"}, "arguments": arguments, "places": len(arguments) * ["axes.arm"]}
    placed = place_arguments(cell, settings)
    assert [each.names for each in placed] == [() if name is None else (name,) for name in names]


def test_settings_of_different_bases(run: Run) -> None:
    """An arm that sets the setting itself is compared with either base. Arms of the two bases are not."""
    three = [*BASE, "--trainer.max_epochs=3"]
    one = run("one", "arm=floor")
    assert added(one, run("two", "arm=two_epochs", base=three)) == {}
    assert added(one, run("three", "arm=gumbel", base=three)) == {"trainer.max_epochs": [1, 3]}


@pytest.mark.parametrize("last", ["arm=ceiling", "arm=ceiling trainer.precision=bf16"])
def test_change_of_an_earlier_command_in_a_folder(run: Run, last: str) -> None:
    """The arm of the last command is the baseline here."""
    folder = run("one", "arm=floor")
    run("one", "arm=gumbel", THREE)
    run("one", *last.split())
    assert added(folder)["trainer.max_epochs"] == [1, 3]
    assert compared(folder) == (set() if "precision" in last else {"floor"})


def test_arguments_have_their_places() -> None:
    """Settings of a mapping are those that it states."""
    own = ["--latent={class_path: A, init_args: {num_codes: 4}}", "--seed_everything=1"]
    changes = ["--trainer={max_epochs: 3}", "--data.path+=b.jsonl", "--latent=b.yaml"]
    places = ["base", "axes.arm", "axes.seed", *3 * ["change"], "tune.axis"]
    cell = {"axes": {"arm": "a", "seed": 1}, "arguments": ["--base=1", *own, *changes, f"{LR}=0.1"], "places": places}
    placed = list(place_arguments(cell, []))
    assert [(each.place, each.axes) for each in placed] == [
        ("axis", ("arm",)),
        ("axis", ("seed",)),
        *[("change", ())] * 3,
        ("tuning", ("arm",)),
    ]
    names = ("latent", "latent.num_codes", "trainer.max_epochs", "data.path", "latent.g.start", "latents")
    setting = [next((place for place, each in enumerate(placed) if each.sets(name)), None) for name in names]
    assert setting == [0, 0, 2, 3, 4, None]


def test_change_to_a_setting_of_the_last_axis(run: Run) -> None:
    """The command line sets what `ceiling` sets as well, in a folder in which another command ran later."""
    folder = run("one", "arm=floor")
    run("one", "arm=gumbel", "data.columns.named_in_prompt=annotator")
    run("one", "arm=two_epochs")
    assert added(folder)["data.columns.named_in_prompt"] == ["none", "annotator"]
