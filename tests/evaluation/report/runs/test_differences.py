"""Tests of the settings that tell runs apart, on small configs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lpc_lightning.evaluation.report.contrasts import contrasts
from lpc_lightning.evaluation.report.runs.arguments import PlacedSettings
from lpc_lightning.evaluation.report.runs.differences import add_axes
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.runs.settings import flatten
from lpc_lightning.evaluation.report.study import make_study

METRIC = "val/rewards/accuracies"
SETTINGS = {
    "algorithm": ("model.*",),
    "latent": ("latent.*",),
    "noise": ("callbacks.*",),
    "codes": ("latent.num_codes",),
    "seed": ("seed_everything", "data.data_seed"),
}
"""Settings that the arguments of each axis set."""
TUNED = PlacedSettings(("model.optimizer.lr",), "tuning", ("latent",))


def a_class(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lpc_lightning.some.{name}", "init_args": arguments}


def fit(**config: Any) -> RunRecord:
    return RunRecord("fit", seed=config.get("seed_everything"), settings=flatten(config))


def cell(axes: dict[str, Any], grid: str = "one", seed: int = 1, value: float = 0.5, **config: Any) -> RunRecord:
    """A cell of a grid over `axes`. Its config has the latent of its axis `latent`."""
    latent = None if axes.get("latent", "none") == "none" else a_class("MarginalSpace", num_codes=axes.get("codes", 10))
    settings = flatten({"seed_everything": seed, "latent": latent, **config})
    name = f"{grid} {axes} {seed}"
    return with_axes(RunRecord(name, axes, seed, metrics={METRIC: value}, settings=settings, grid=grid), axes)


def with_axes(record: RunRecord, axes: dict[str, Any]) -> RunRecord:
    """Give a cell other axes, with their arguments."""
    names = (*axes, "seed")
    arguments = tuple(PlacedSettings(SETTINGS[axis], "axis", (axis,)) for axis in names)
    return replace(record, axes=axes, grid_axes=names, arguments=arguments)


def added(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Return the axes that `add_axes` adds to each record."""
    pairs = zip(records, add_axes(records), strict=True)
    return [{axis: value for axis, value in new.axes.items() if axis not in old.axes} for old, new in pairs]


# Runs of fit


def names(*configs: dict[str, Any]) -> list[str]:
    """Return the names of the axes of runs of `fit`."""
    return list(dict.fromkeys(axis for axes in added([fit(**config) for config in configs]) for axis in axes))


def test_fits_differ_in_no_seed_and_no_path() -> None:
    assert names(*({"seed_everything": seed, "trainer": {"default_root_dir": f"runs/{seed}"}} for seed in (1, 2))) == []


def test_fits_with_derived_seeds() -> None:
    paired = [{"seed_everything": seed, "data": {"data_seed": 10 + seed}} for seed in (1, 2, 1)]
    crossed = [{"seed_everything": seed, "data": {"data_seed": other}} for seed in (1, 2) for other in (1, 2)]
    assert names(*paired) == []
    assert names(*crossed) == ["data.data_seed"]


def test_fits_with_defaults_of_their_classes() -> None:
    """SimPO has its own default of beta, DPO has no `gamma_beta_ratio`, and a run without latent has no codes."""
    dpo, simpo = a_class("DPO", beta=0.1), a_class("SimPO", beta=2.0, gamma_beta_ratio=0.5)
    spaces = (None, a_class("MarginalSpace", num_codes=4))
    assert names(*({"model": model, "latent": space} for model in (dpo, simpo) for space in spaces)) == [
        "model",
        "latent",
    ]


def test_fits_with_settings_beside_their_class() -> None:
    """A beta that is no default, and a learning rate, are differences although they follow the class."""
    models = [
        a_class(name, beta=beta, optimizer=a_class("AdamW", lr=lr))
        for name, beta, lr in (("DPO", 0.1, 1e-4), ("SimPO", 10.0, 1e-3))
    ]
    assert names(*({"model": model} for model in models)) == ["model", "model.beta", "model.optimizer.lr"]
    spaces = [a_class(name, num_codes=codes) for name, codes in (("GumbelSpace", 32), ("MarginalSpace", 10))]
    assert names(*({"latent": space} for space in spaces)) == ["latent", "latent.num_codes"]


def test_fits_within_a_class() -> None:
    spaces = [None, *(a_class("MarginalSpace", num_codes=codes) for codes in (4, 8))]
    records = [fit(latent=space) for space in spaces]
    assert added(records) == [
        {"latent": "none"},
        {"latent": "MarginalSpace", "latent.num_codes": 4},
        {"latent": "MarginalSpace", "latent.num_codes": 8},
    ]


def test_fits_with_a_setting_that_is_a_mapping_or_null() -> None:
    records = [fit(data=a_class("P", columns=columns)) for columns in (None, {"annotator": "factor"})]
    assert added(records) == [{"data.columns.annotator": "none"}, {"data.columns.annotator": "factor"}]


def test_fits_with_callbacks_or_none() -> None:
    flips = [a_class("LabelFlipNoise", rate=0.3)]
    assert names({"callbacks": None}, {"callbacks": []}) == []
    assert added([fit(model=a_class("DPO"), callbacks=callbacks) for callbacks in (None, flips)]) == [
        {"callbacks.LabelFlipNoise": "none"},
        {"callbacks.LabelFlipNoise": "LabelFlipNoise"},
    ]


# Cells


def test_one_grid_has_its_axes_alone() -> None:
    flips = a_class("LabelFlipNoise", rate=0.3)
    records = [
        cell(
            {"latent": latent, "noise": noise}, seed=seed, callbacks=[flips] if noise else [], data={"data_seed": seed}
        )
        for latent in ("none", "marginal")
        for noise in (0, 0.3)
        for seed in (1, 2)
    ]
    assert added(records) == [{}] * 8


def test_grids_that_differ_in_their_base() -> None:
    """The setting follows the axis, but no grid sets it by this axis."""
    records = [
        cell({"latent": "none"}, "one", data={"train_pairs": 4096}),
        cell({"latent": "marginal"}, "two", data={"train_pairs": 8192}),
    ]
    assert added(records) == [{"data.train_pairs": 4096}, {"data.train_pairs": 8192}]
    compared, unmatched = contrasts(make_study(add_axes(records)), [METRIC], {"latent": "none"})
    assert compared == []
    assert "data.train_pairs=8192" in unmatched[0].why


def test_cells_of_one_grid_after_a_change() -> None:
    """A command may have changed a setting for some cells of a folder."""
    records = [
        cell({"latent": "none"}, data={"train_pairs": 4096}),
        cell({"latent": "marginal"}, data={"train_pairs": 8192}),
    ]
    assert added(records) == [{"data.train_pairs": 4096}, {"data.train_pairs": 8192}]


def test_grids_with_an_arm_each() -> None:
    """The arms are settings of the axis, so that they are compared."""
    records = [cell({"latent": "none"}, "one", seed) for seed in (1, 2)]
    records += [cell({"latent": "marginal"}, "two", seed, 0.7) for seed in (1, 2)]
    assert added(records) == [{}] * 4
    compared, _ = contrasts(make_study(add_axes(records)), [METRIC], {"latent": "none"})
    assert [contrast.difference.estimate.mean for contrast in compared if contrast.difference] == [pytest.approx(0.2)]


def test_grids_with_other_values_of_an_arm() -> None:
    records = [cell({"latent": "marginal"}, "one"), cell({"latent": "marginal"}, "two")]
    other = cell({"latent": "marginal", "codes": 32}, "three")
    assert added(records) == [{}] * 2
    assert added([*records, other]) == [{"latent.num_codes": codes} for codes in (10, 10, 32)]


def test_grids_with_and_without_noise() -> None:
    """The grid without the axis is no baseline for the flipped cells of the other."""
    flips = a_class("LabelFlipNoise", rate=0.3)
    records = [cell({"latent": "none"}, "one"), cell({"latent": "marginal", "noise": 0.3}, "two", callbacks=[flips])]
    assert added(records) == [
        {"callbacks.LabelFlipNoise": "none"},
        {"callbacks.LabelFlipNoise": "LabelFlipNoise"},
    ]
    assert contrasts(make_study(add_axes(records)), [METRIC], {"latent": "none"})[0] == []


@pytest.mark.parametrize("baseline", ["none", "marginal"])
def test_axis_that_another_grid_has_in_its_base(baseline: str) -> None:
    """One grid has the algorithm as an axis, the other in its base. Either is a baseline for the other."""
    dpo, other = a_class("DPO", beta=0.1), "marginal" if baseline == "none" else "none"
    first = cell({"latent": "none"}, "one", model=dpo)
    second = with_axes(cell({"latent": "marginal"}, "two", model=dpo), {"algorithm": "dpo", "latent": "marginal"})
    study = make_study(add_axes([first, second]), {"algorithm": ["dpo"]})
    assert list(study.axes) == ["latent"]
    compared, unmatched = contrasts(study, [METRIC], {"latent": baseline})
    assert [contrast.group.axes for contrast in compared] == [{"latent": other}]
    assert unmatched == []
    unlike = replace(first, settings={**first.settings, "model.beta": 0.2})
    assert "algorithm" in make_study(add_axes([unlike, second])).axes


def test_axis_that_does_not_apply_to_the_baseline() -> None:
    records = [cell({"latent": "none"}, "one"), *(cell({"latent": "m", "codes": codes}, "two") for codes in (8, 16))]
    assert added(records) == [{}] * 3
    compared, _ = contrasts(make_study(add_axes(records)), [METRIC], {"latent": "none"})
    assert len(compared) == 2


def test_cells_beside_a_fit() -> None:
    records = [
        cell({"latent": "none"}, model=a_class("DPO", beta=0.1)),
        fit(model=a_class("DPO", beta=0.2), latent=a_class("MarginalSpace", num_codes=10)),
    ]
    assert added(records) == [
        {"setting.latent": "none", "model.beta": 0.1},
        {"latent": "MarginalSpace", "model.beta": 0.2},
    ]


def test_grids_with_data_by_seed_and_fixed_data() -> None:
    varied = [cell({"latent": "none"}, "one", seed, data={"data_seed": seed}) for seed in (1, 2)]
    again = cell({"latent": "none"}, "again", 3, data={"data_seed": 3})
    fixed = [cell({"latent": "none"}, "two", seed, data={"data_seed": 0}) for seed in (1, 2)]
    assert added([*varied, again]) == [{}] * 3
    assert [axes["data.data_seed"] for axes in added([*varied, *fixed])] == ["by seed", "by seed", 0, 0]


def test_grids_tuned_in_different_ways() -> None:
    tune = "lr of 0.001, 0.01"

    def tuned(latent: str, grid: str, value: float, section: str) -> RunRecord:
        record = cell({"latent": latent}, grid, model=a_class("DPO", optimizer=a_class("AdamW", lr=value)))
        settings = {**record.settings, "tune": section}
        return replace(record, settings=settings, arguments=(*record.arguments, TUNED))

    alike = [tuned("none", "one", 0.01, tune), tuned("marginal", "two", 0.001, tune)]
    assert added(alike) == [{}] * 2
    assert added([alike[0], tuned("marginal", "two", 0.001, "none")]) == [{"tune": tune}, {"tune": "none"}]
    assert added([alike[0], tuned("none", "two", 0.001, tune)]) == [
        {"model.optimizer.lr": 0.01},
        {"model.optimizer.lr": 0.001},
    ]


def test_tuned_grids_that_differ_in_their_base() -> None:
    """Arms of one grid are compared at their own rates. A rate that was set by hand is a difference."""

    def tuned(latent: str, pairs: int, value: float, section: str = "lr of 0.001, 0.01") -> RunRecord:
        model = a_class("DPO", optimizer=a_class("AdamW", lr=value))
        record = cell({"latent": latent}, str(pairs), value=value, model=model, data={"train_pairs": pairs})
        settings = {**record.settings, "tune": section}
        return replace(record, settings=settings, arguments=(*record.arguments, TUNED), tuned={"lr": value})

    alike = [tuned("none", 4, 0.01), tuned("marginal", 4, 0.001), tuned("none", 8, 0.001), tuned("marginal", 8, 0.001)]
    assert added(alike) == [{"data.train_pairs": pairs} for pairs in (4, 4, 8, 8)]
    compared, unmatched = contrasts(make_study(add_axes(alike)), [METRIC], {"latent": "none"})
    found = [contrast.difference.estimate.mean for contrast in compared if contrast.difference]
    assert found == [pytest.approx(0.001 - 0.01), 0]
    assert unmatched == []
    by_hand = added([*alike, tuned("marginal", 8, 0.003, "none")])
    assert [axes["model.optimizer.lr"] for axes in by_hand] == ["tuned"] * 4 + [0.003]
    twice = added([*alike, tuned("none", 4, 0.003)])
    assert [axes["model.optimizer.lr"] for axes in twice] == [0.01, 0.001, 0.001, 0.001, 0.003]


def test_missing_cell_has_settings_of_its_grid() -> None:
    missing = RunRecord("missing", {"latent": "marginal"}, 2, "missing", grid="one")
    records = [*(cell({"latent": "none"}, str(pairs), data={"train_pairs": pairs}) for pairs in (1, 2)), missing]
    assert added([*records[:2], RunRecord("missing", {"latent": "marginal"}, 2, "missing", grid="1")])[2] == {
        "data.train_pairs": 1
    }
    assert added(records)[2] == {}
