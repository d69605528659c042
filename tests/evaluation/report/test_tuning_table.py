"""Tests of the table of tuned axes, for one ablation and for two that agree in all axes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lpc_lightning.evaluation.report.command import report
from lpc_lightning.evaluation.report.runs.records import GroupTuning, RunRecord
from lpc_lightning.evaluation.report.study import make_study
from lpc_lightning.evaluation.report.table_files import to_markdown
from lpc_lightning.evaluation.report.tables import means_table
from lpc_lightning.evaluation.report.tuning_table import tuning_table, unequal_tunings

STUDY = make_study([RunRecord(latent, {"latent": latent}) for latent in ("none", "marginal")])


def tuned(ablation: str, value: float, **axes: Any) -> GroupTuning:
    scores: dict[Any, dict[int, float | None]] = {1e-4: {101: 0.5, 102: 0.7}, 3e-4: {101: 0.6, 102: 0.8}}
    return GroupTuning(
        ablation,
        {"latent": "none", **axes},
        "lr",
        "lr by the largest val/accuracy",
        value,
        "",
        scores,
        (),
        "val/accuracy",
    )


def rows_of(*tunings: GroupTuning) -> list[list[str]]:
    lines = [line for line in to_markdown(tuning_table(STUDY, tunings)).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_tuning_table_of_one_ablation() -> None:
    assert rows_of(tuned("one", 3e-4)) == [
        ["latent", "lr", "at 0.0001", "at 0.0003", "note"],
        ["none", "0.0003", "0.6000", "* 0.7000", ""],
    ]
    assert "ablation" not in tuning_table(STUDY, [tuned("one", 3e-4)]).records[0]


def test_tuning_table_names_each_ablation() -> None:
    """One epoch and two have the same axes, and other choices."""
    table = tuned("one_epoch", 3e-4), tuned("two_epochs", 1e-4)
    assert [row[:4] for row in rows_of(*table)] == [
        ["ablation", "latent", "lr", "at 0.0001"],
        ["one_epoch", "none", "0.0003", "0.6000"],
        ["two_epochs", "none", "0.0001", "* 0.6000"],
    ]
    chosen = {(line["ablation"], line["value"]) for line in tuning_table(STUDY, table).records if line["is_chosen"]}
    assert chosen == {("one_epoch", 3e-4), ("two_epochs", 1e-4)}


def test_tuning_table_has_the_axes_of_other_tables() -> None:
    """An axis with one value is in the CSV file only. One that the runs of another grid lack is in no table."""
    axes: dict[str, Any] = {"noise": 0, "latent": "none"}
    study = make_study([RunRecord("a", axes), RunRecord("b", {**axes, "latent": "marginal"})])
    means = means_table(study, ["val/a"])
    tunings = tuning_table(study, [tuned("one", 3e-4, algorithm="dpo", noise=0)])
    assert [column.name for column in means.columns][:2] == ["latent", "val/a"]
    assert [column.name for column in tunings.columns][:2] == ["latent", "lr"]
    assert list(means.records[0])[:3] == ["latent", "noise", "metric"]
    assert list(tunings.records[0])[:3] == ["latent", "noise", "tuned"]


def test_means_of_a_tuned_axis_and_a_plain_one() -> None:
    """One grid has tuned the axis that another grid has with values of its own. Every value is in one column."""
    records = [RunRecord("a", {}, 1, metrics={"val/a": 0.5}, tuned={"lr": 3e-4})]
    records += [RunRecord(str(lr), {"lr": lr}, 1, metrics={"val/a": lr}) for lr in (1e-2, 1e-3)]
    table = means_table(make_study(records), ["val/a"])
    assert [column.name for column in table.columns].count("lr") == 1
    assert [row[0].text for row in table.rows] == ["0.0003", "0.001", "0.01"]
    assert [(record["lr"], record["mean"]) for record in table.records] == [(3e-4, 0.5), (1e-3, 1e-3), (1e-2, 1e-2)]


def test_groups_with_unequal_tuning() -> None:
    """One arm was widened alone. Each group has its own note, and the list names the one with fewer values."""
    wide = replace(tuned("wide", 1e-3, latent="marginal"), scores={1e-4: {1: 0.5}, 3e-4: {1: 0.6}, 1e-3: {1: 0.7}})
    both = [replace(tuned("narrow", 3e-4), note="at an edge"), replace(wide, added=(1e-3,))]
    missing = "not tried at 0.001 as other groups were"
    assert [row[-1] for row in rows_of(*both)[1:]] == [f"at an edge; {missing}", ""]
    assert [row[-2] for row in rows_of(*both)[1:]] == ["-", "+* 0.7000"]
    records = tuning_table(STUDY, both).records
    assert {(line["ablation"], line["note"]) for line in records} == {
        ("narrow", f"at an edge; {missing}"),
        ("wide", ""),
    }
    assert unequal_tunings(both) == [("narrow, latent=none", "unequal tuning", f"lr: {missing}")]
    assert "for all groups because" not in tuning_table(STUDY, both).notes[0]
    assert unequal_tunings([both[0]]) == []


@pytest.mark.parametrize(
    "change",
    [
        {"axis": "beta", "section": "beta by the largest val/accuracy"},
        {"by": "val/adaptation/adapted/8", "section": "lr by the largest val/adaptation/adapted/8"},
        {"section": "lr by the largest val/accuracy, with --data.noise=0.3"},
    ],
)
def test_groups_of_different_sections(change: dict[str, Any]) -> None:
    """Groups that another section `tune` has tuned were tried at values of their own. They are not compared."""
    other = replace(tuned("other", 1e-3, latent="marginal"), scores={1e-4: {1: 0.5}, 1e-3: {1: 0.7}}, **change)
    assert unequal_tunings([tuned("one", 3e-4), other]) == []
    assert [row[-1] for row in rows_of(tuned("one", 3e-4), other)[1:]] == ["", ""]


def test_report_names_unequal_tuning(
    write_ablation: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = {"axis": "lr", "values": [0.1], "seeds": [101], "by": "val/loss", "mode": "min", "widen": 2}
    folders = []
    for latent, values in (("none", (0.1, 0.3)), ("marginal", (0.1, 0.3, 0.9))):
        folder = write_ablation({"latent": [latent]}, [1, 2], lambda latent, seed: 0.5 + seed / 10, latent)
        cells = [{"seed": 101, "cell": "c", "status": "scored", "score": 0.5}]
        tried = [{"value": value, "added": value == 0.9, "mean": 0.5, "cells": cells} for value in values]
        group = {"axes": {"latent": latent}, "tune": tune, "value": 0.3, "note": "", "values": tried}
        (folder / "tuning.json").write_text(json.dumps({"groups": [group]}))
        folders.append(str(folder))
    note = "lr: not tried at 0.9 as other groups were"
    report(folders, out=str(tmp_path / "out"))
    summary = f"The groups were not tuned at the same values: none, latent=none ({note})."
    assert summary in capsys.readouterr().out
    for name, text in (("report.html", summary), ("left_out.csv", f"unequal tuning,{note}")):
        assert text in (tmp_path / "out" / name).read_text(), name
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.replace("\\", "").count("not tried at 0.9 as other groups were") == 3, "summary, table and list"
    report(folders[:1], out=str(tmp_path / "one"))
    assert "not tuned at the same values" not in (tmp_path / "one" / "report.html").read_text()
