"""Tests of grids: from a YAML file to cells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.grid import Grid, read_grid

GRID: dict[str, Any] = {
    "base": ["--config=a.yaml"],
    "axes": {
        "algorithm": {"dpo": ["--model=DPO"], "simpo": ["--model=SimPO", "--model.beta=2"]},
        "noise": {"values": [0, 0.1], "arguments": ["--callbacks+=F", '--callbacks.x={"rate": {value}}']},
        "codes": {"values": [8, None], "key": "latent.num_codes"},
    },
}
MODELS = {"dpo": ["--model.robust_loss=null"], "simpo": ["--model.beta=2"]}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def write_and_read(content: Any) -> Grid:
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return read_grid(path)

    return write_and_read


def test_cells_of_every_combination(read: Any) -> None:
    cells = read(GRID).cells()
    assert [tuple(cell.axes.values()) for cell in cells] == [
        (algorithm, noise, codes) for algorithm in ("dpo", "simpo") for noise in (0, 0.1) for codes in (8, None)
    ]
    assert cells[-1].name == "algorithm=simpo,noise=0.1,codes=null"
    assert cells[-1].arguments == (
        "--config=a.yaml",
        "--model=SimPO",
        "--model.beta=2",
        "--callbacks+=F",
        '--callbacks.x={"rate": 0.1}',
        "--latent.num_codes=null",
    )


def test_cells_without_skipped_combinations(read: Any) -> None:
    cells = read({**GRID, "skip": [{"algorithm": "simpo", "noise": [0.1]}, {"codes": None, "noise": 0}]}).cells()
    assert [tuple(cell.axes.values()) for cell in cells] == [
        ("dpo", 0, 8),
        ("dpo", 0.1, 8),
        ("dpo", 0.1, None),
        ("simpo", 0, 8),
    ]


@pytest.mark.parametrize(("skipped", "value"), [(0, "0.0"), (0.0, "0"), (0.25, "2.5e-1"), ("25e-2", "0.25")])
def test_skip_compares_numbers(read: Any, skipped: Any, value: str) -> None:
    grid = read({**GRID, "skip": [{"algorithm": ["simpo"], "noise": skipped}]}).with_changes([f"noise={value}"])
    assert [cell.axes["algorithm"] for cell in grid.cells()] == ["dpo", "dpo"]
    assert len(grid.with_changes(["noise=0.5"]).cells()) == 4


def test_number_in_two_forms(read: Any) -> None:
    """3e-4 is a text in YAML. A fit reads one number from both. 1 and 1.0 may differ: one batch, or all of them."""
    rates = {"base": [], "axes": {"lr": {"values": ["3e-4", 1e-3], "key": "lr"}, "name": {"3e-4": ["--name=3e-4"]}}}
    grid = read(rates)
    assert [cell.name for cell in grid.cells()] == ["lr=0.0003,name=3e-4", "lr=0.001,name=3e-4"]
    assert [cell.arguments for cell in grid.cells()] == [(f"--lr={lr}", "--name=3e-4") for lr in ("0.0003", "0.001")]
    assert grid.with_changes(["lr=3e-4,1e-3"]).cells() == grid.cells()
    with pytest.raises(ConfigError, match="a value twice"):
        grid.with_changes(["lr=3e-4,0.0003"]).cells()
    assert [cell.arguments[0] for cell in grid.with_changes(["lr=1,1.0"]).cells()] == ["--lr=1", "--lr=1.0"]


def test_changes_replace_values_and_add_settings(read: Any) -> None:
    grid = read(GRID).with_changes(["algorithm=simpo", "noise=0.2,0.3,0.4", "codes=8", "trainer.max_steps=5"])
    cells = grid.cells()
    assert [tuple(cell.axes.values()) for cell in cells] == [("simpo", rate, 8) for rate in (0.2, 0.3, 0.4)]
    assert all(cell.arguments[-1] == "--trainer.max_steps=5" for cell in cells)


@pytest.mark.parametrize(
    ("changes", "axis"),
    [
        (["latent.num_codes=4"], "codes"),
        (["latent.init_args.num_codes=8"], "codes"),
        (["latent=null"], "codes"),
        (["latent={class_path: X, init_args: {num_codes: 4}}"], "codes"),
        (["latent=groups/codes.yaml"], "codes"),
        (["model.beta=3"], "algorithm"),
        (["model=IPO"], None),
        (["callbacks.x.rate=0.3"], "noise"),
        (["callbacks=groups/codes.yaml"], "noise"),
        (["algorithm=dpo", "model.beta=3"], None),
        (["latent=groups/other.yaml"], None),
        (["latent.num_heads=2", "callbacks.order=X", "trainer.max_steps=5", "model.beta.x=1"], None),
    ],
)
def test_change_replaces_no_argument_of_an_axis(
    read: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], axis: str | None
) -> None:
    """The cells with 8 codes would run with 4."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "codes.yaml").write_text("init_args: {num_codes: 4}")
    (tmp_path / "groups" / "other.yaml").write_text("init_args: {num_heads: 4}")
    grid = read({**GRID, "axes": {**GRID["axes"], "algorithm": MODELS}})
    if axis is None:
        assert grid.with_changes(changes).cells()[-1].arguments[-1] == f"--{changes[-1]}"
    else:
        with pytest.raises(
            ConfigError, match=rf"grid change: found --{re.escape(changes[-1])}, .* of the axis {axis}, "
        ):
            grid.with_changes(changes)


def test_settings_of_other_callbacks_may_change(read: Any) -> None:
    """`callbacks.rate` belongs to the callback that was added last."""
    base, noise = ["--callbacks+=A", "--callbacks.rate=1"], ["--callbacks+=B", "--callbacks.rate={value}"]
    other = {"none": [], "more": ["--callbacks+=C"], "set": ["--callbacks+=C", "--callbacks.rate=1"]}
    grid = read({"base": base, "axes": {"noise": {"values": [0], "arguments": noise}, "other": other}})
    assert grid.with_changes(["other=more", "callbacks.rate=0.3"]).cells()[0].arguments[-1] == "--callbacks.rate=0.3"
    for value, axis in (("none", "noise"), ("set", "other"), ("more,none", "noise")):
        with pytest.raises(ConfigError, match=rf"found --callbacks\.rate=0\.3, which .* of the axis {axis}, "):
            grid.with_changes([f"other={value}", "callbacks.rate=0.3"])


def test_file_of_an_axis_replaces_no_setting_of_base(read: Any, tmp_path: Path) -> None:
    """The cells would have batches of 8. An axis may change a setting under its own name, or state it again."""
    file = tmp_path / "votes.yaml"
    file.write_text("class_path: PreferenceData\ninit_args: {path: votes.jsonl, batch_size: 8}")
    base = ["--data.batch_size=122", "--data.max_length=64", "--trainer.max_epochs=1"]

    def grid(*arguments: str) -> Any:
        return read({"base": base, "axes": {"data": {"votes": [f"--data={file}", *arguments]}}})

    with pytest.raises(
        ConfigError,
        match=r"axes\.data: found --data=.*votes\.yaml, whose file replaces --data\.batch_size=122 of base, .* "
        r"State it in axes\.data",
    ):
        grid("--trainer.max_epochs=2")
    assert grid("--data.init_args.batch_size=122").cells()[0].arguments[-1] == "--data.init_args.batch_size=122"
    whole = read({"base": base, "axes": {"latent": {"none": ["--latent=null"]}}})
    with pytest.raises(ConfigError, match=r"change: found --data=.*State it at the end of the command"):
        whole.with_changes([f"data={file}"])
    assert whole.with_changes([f"data={file}", "data.batch_size=4"]).cells()
    base.remove("--data.batch_size=122")
    assert len(grid("--trainer.max_epochs=2").cells()[0].arguments) == 4


def test_axis_replaces_no_argument_of_another(read: Any, tmp_path: Path) -> None:
    beta = {"values": [0.1], "key": "model.beta"}
    message = r"axes\.beta: found --model\.beta=0\.1, which replaces --model\.beta=2 of the axis algorithm"
    with pytest.raises(ConfigError, match=message):
        read({**GRID, "axes": {**GRID["axes"], "beta": beta}})
    grid = read({**GRID, "axes": {**GRID["axes"], "beta": beta}, "skip": [{"algorithm": "simpo"}]})
    assert {cell.arguments[-1] for cell in grid.cells()} == {"--model.beta=0.1"}
    (tmp_path / "fit.yaml").write_text("model: algorithm.yaml\ntrainer: {max_epochs: 2}")
    (tmp_path / "algorithm.yaml").write_text("init_args: {beta: 1}")
    files = {"one": [f"--config={tmp_path / 'fit.yaml'}"]}
    message = r"axes\.files: found --config=.*, which replaces --model\.beta=2 of the axis algorithm"
    with pytest.raises(ConfigError, match=message):
        read({**GRID, "axes": {**GRID["axes"], "files": files}})
    assert read({**GRID, "axes": {"files": files, **GRID["axes"]}}).cells()


def test_axis_with_more_names_than_values(read: Any) -> None:
    algorithm = {"values": ["simpo"], **GRID["axes"]["algorithm"]}
    grid = read({**GRID, "axes": {**GRID["axes"], "algorithm": algorithm}})
    assert {cell.axes["algorithm"] for cell in grid.cells()} == {"simpo"}
    assert grid.with_changes(["algorithm=dpo,simpo"]).cells() == read(GRID).cells()
    with pytest.raises(ConfigError, match="algorithm: found ppo, expected dpo, simpo"):
        read({**GRID, "axes": {"algorithm": algorithm | {"values": ["ppo"]}}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("algorithm=ppo", "algorithm: found ppo, expected dpo, simpo"),
        ("sede=1", "found 'sede=1', expected AXIS=VALUE,VALUE with one of the axes algorithm, noise, codes"),
        ("noise", "found 'noise', expected AXIS=VALUE"),
    ],
)
def test_changes_reject_unknown_names(read: Any, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(GRID).with_changes([change])


def test_changes_name_each_axis_once(read: Any) -> None:
    """The first values would be gone. Of a setting the last value counts, as in a fit."""
    with pytest.raises(
        ConfigError, match=r"found noise=0 and noise=0\.1, expected one change of noise with all values"
    ):
        read(GRID).with_changes(["noise=0", "codes=8", "noise=0.1"])
    latents = {"base": [], "axes": {"latent": {"none": ["--latent=null"], "gumbel": ["--latent=G"]}}}
    with pytest.raises(ConfigError, match="found latent=none and latent=gumbel, expected one change of latent"):
        read(latents).with_changes(["latent=none", "latent=gumbel"])
    steps = ["trainer.max_steps=5", "trainer.max_steps=6"]
    assert read(GRID).with_changes(steps).cells()[0].arguments[-2:] == tuple(f"--{change}" for change in steps)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([1], "found list, expected base, axes"),
        ({"base": []}, "found base, expected base, axes"),
        ({**GRID, "axes": [1]}, "found base, axes, expected base, axes"),
        ({**GRID, "axis": {}}, "found base, axes, axis, expected"),
        ({**GRID, "base": ["fit"]}, "base: found 'fit', expected arguments of fit"),
        ({**GRID, "axes": {"seed": [1]}}, r"axes.seed: found \[1\], expected names"),
        ({**GRID, "axes": {"seed": {"values": [1]}}}, "axes.seed: found values, expected a list of values, and key"),
        ({**GRID, "axes": {"seed": {"values": 1, "key": "s"}}}, "expected a list of values"),
        ({**GRID, "skip": [{"sede": 1}]}, "skip: found {'sede': 1}, expected values for some of algorithm"),
        ({**GRID, "skip": [{"algorithm": "dpoo"}]}, "skip: algorithm: found dpoo, expected dpo, simpo"),
        ({**GRID, "skip": [{"algorithm": ["dpo", "ppo"], "noise": 0}]}, "skip: algorithm: found ppo, expected dpo"),
    ],
)
def test_read_grid_rejects_invalid_content(read: Any, grid: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(grid)


def test_extended_grid_states_what_differs(read: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "full.yaml").write_text(yaml.safe_dump(GRID | {"skip": [{"codes": 8}]}, sort_keys=False))
    axes = {
        "algorithm": {"simpo": None, "ipo": ["--model=IPO"]},
        "seed": {"values": [1], "key": "seed_everything"},
        "noise": {"values": [0.5]},
        "codes": {},
    }
    grid = read({"extends": "other/full.yaml", "base": ["--config=b.yaml"], "axes": axes, "skip": None})
    assert grid.name == "grid"
    assert grid.base == ("--config=b.yaml",)
    assert grid.skip == ()
    assert [(axis.name, axis.arguments, axis.values) for axis in grid.axes] == [
        ("algorithm", {"dpo": ("--model=DPO",), "ipo": ("--model=IPO",)}, ("dpo", "ipo")),
        ("seed", ("--seed_everything={value}",), (1,)),
        ("noise", ("--callbacks+=F", '--callbacks.x={"rate": {value}}'), (0.5,)),
        ("codes", ("--latent.num_codes={value}",), (8, None)),
    ]


def test_extended_grid_may_extend_another(read: Any, tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(GRID, sort_keys=False))
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({"extends": "first.yaml", "axes": {"noise": None}}))
    grid = read({"extends": "second.yaml", "base": []})
    assert [axis.name for axis in grid.axes] == ["algorithm", "codes"]
    assert grid.base == ()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"extends": "none.yaml"}, r"grid\.yaml extends: found no file .*none\.yaml"),
        ({"extends": ["other.yaml"]}, r"grid\.yaml extends: found \['other.yaml'\], expected the name of a grid file"),
        ({"extends": "grid.yaml"}, r"grid\.yaml extends: found grid.yaml, which extends grid.yaml"),
        ({"extends": "circle.yaml"}, r"circle\.yaml extends: found grid.yaml, which extends circle.yaml"),
        ({"extends": "wrong.yaml"}, r"wrong\.yaml base: found 'fit'"),
        (
            {"extends": "other.yaml", "axes": {"sede": None}},
            r"grid\.yaml axes sede: found null.*one of algorithm, noise",
        ),
        (
            {"extends": "other.yaml", "axes": {"codes": {"key": None}}},
            r"grid\.yaml axes\.codes: found values, expected",
        ),
        ({"extends": "other.yaml", "axes": None}, r"grid\.yaml: found base, expected base, axes"),
    ],
)
def test_extends_rejects_invalid_content(read: Any, tmp_path: Path, grid: Any, message: str) -> None:
    others = {"other": GRID, "wrong": GRID | {"base": ["fit"]}, "circle": {"extends": "grid.yaml"}}
    for name, content in others.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        read(grid)


def test_read_grid_rejects_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"found no file .*none\.yaml"):
        read_grid(tmp_path / "none.yaml")


@pytest.mark.parametrize(("change", "message"), [("seed=1,1", "a value twice"), ("skip", "found no cell")])
def test_cells_rejects_empty_grid_and_repeated_values(read: Any, change: str, message: str) -> None:
    grid = {"base": [], "axes": {"seed": {"values": [1], "key": "seed_everything"}}}
    changed = read(grid).with_changes([change]) if "=" in change else read({**grid, "skip": [{"seed": 1}]})
    with pytest.raises(ConfigError, match=message):
        changed.cells()


def test_cells_rejects_grid_without_axes(read: Any) -> None:
    """Its only cell would have no name, and its folder would be that of all cells."""
    with pytest.raises(ConfigError, match="grid axes: found none, expected at least one, such as seed"):
        read({"base": [], "axes": {}}).cells()


def test_cell_names_are_valid_and_distinct(read: Any) -> None:
    values = ["a/b", "a b", "a_b", "x" * 300, "x" * 299 + "y"]
    cells = read({"base": [], "axes": {"path": {"values": values, "key": "data.path"}}}).cells()
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(values)
    assert all("/" not in name and len(name.encode()) < 255 for name in names)
    assert names[2] == "path=a_b"
