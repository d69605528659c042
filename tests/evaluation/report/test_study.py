"""Tests of groups and left-out runs, on numbers chosen by hand."""

from __future__ import annotations

from math import nan
from typing import Any

import pytest

from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.study import make_study

METRIC = "val/rewards/accuracies"


def run(seed: int | None, value: float | None = None, status: str = "finished", **axes: Any) -> RunRecord:
    name = ",".join(f"{axis}={axis_value}" for axis, axis_value in axes.items()) + f",seed={seed}"
    return RunRecord(name, axes, seed, status, metrics={} if value is None else {METRIC: value})


def test_make_study_groups_by_seed() -> None:
    records = [run(seed, 0.1 * seed, latent=latent, beta=0.1) for seed in (2, 1) for latent in ("none", "marginal")]
    study = make_study(records)
    assert study.axes == {"latent": ("none", "marginal")}
    assert study.constant == {"beta": 0.1}
    assert [[record.seed for record in group.records] for group in study.groups] == [[2, 1], [2, 1]]
    assert study.metrics == [METRIC]


def test_make_study_order_of_values() -> None:
    records = [run(1, 0.5, latent=latent, codes=codes) for codes in (16, 8) for latent in ("b", "a")]
    study = make_study(records, {"latent": ("a", "b", "never")})
    assert study.axes == {"latent": ("a", "b", "never"), "codes": (8, 16)}
    assert [tuple(group.axes.values()) for group in study.groups] == [("a", 8), ("a", 16), ("b", 8), ("b", 16)]


def test_make_study_axis_of_some_runs() -> None:
    study = make_study([run(1, 0.5, latent="none"), run(1, 0.5, latent="marginal", codes=8)])
    assert study.axes == {"latent": ("none", "marginal"), "codes": (8,)}


def test_label() -> None:
    first = RunRecord("a", {"algorithm": "DPO", "latent": "none", "data.noise": 0.1}, 1)
    other = RunRecord("b", {"algorithm": "IPO", "latent": "marginal", "data.noise": 0.2}, 1)
    study = make_study([first, other])
    assert [study.label(group) for group in study.groups] == ["DPO, latent none, noise 0.1", "IPO, marginal, noise 0.2"]
    assert study.label(study.groups[0], "data.noise", "latent") == "DPO"
    assert make_study([first]).label(make_study([first]).groups[0]) == "all runs"


def test_left_out() -> None:
    records = [
        run(1, 0.5),
        run(1, 0.6),
        run(2, None, "failed"),
        run(3, None, "missing"),
        run(4, nan),
        run(5),
        run(6, 0.7, "unknown"),
    ]
    study = make_study(records)
    (group,) = study.groups
    assert [value for _, value in group.values(METRIC)] == [0.6, 0.7]
    mean = group.estimate(METRIC)
    assert mean is not None
    assert mean.mean == pytest.approx(0.65)
    assert [(entry.run[-1], entry.status) for entry in study.left_out([METRIC])] == [
        ("1", "repeated"),
        ("2", "failed"),
        ("3", "missing"),
        ("6", "unknown"),
        ("4", "no number"),
        ("5", "no metric"),
        ("s", "no test"),
    ]


def test_runs_without_seed_are_separate() -> None:
    records = [RunRecord(name, {}, None, metrics={METRIC: value}) for name, value in (("a", 0.5), ("b", 0.6))]
    (group,) = make_study(records).groups
    assert len(group.values(METRIC)) == 2


def test_killed_repetition_does_not_replace_a_run() -> None:
    finished, killed = run(1, 0.7), run(1, 0.5, "unknown")
    for records in ([finished, killed], [killed, finished], [killed, finished, killed]):
        (group,) = make_study(records).groups
        assert [value for _, value in group.values(METRIC)] == [0.7]
        entries = [entry.why for entry in make_study(records).left_out([METRIC]) if entry.status == "repeated"]
        assert entries == ["a finished or later run has the same settings and seed 1"] * (len(records) - 1)
    (group,) = make_study([run(1, 0.4, "unknown"), killed]).groups
    assert [value for _, value in group.values(METRIC)] == [0.5]
