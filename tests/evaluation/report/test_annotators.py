"""Tests of reports whose intervals cover the choice of annotators, from cells on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from lpc_lightning.evaluation.adaptation.scores import mean_score
from lpc_lightning.evaluation.report.contrasts import contrasts
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.study import Study, make_study
from lpc_lightning.evaluation.report.tables import contrasts_table, means_table

METRIC = "val/rewards/accuracies"
"""The fixture writes this metric. The tests give it the name of one of adaptation."""
NAME = "val/adaptation/adapted/8"
PROMPTS = np.repeat([f"p{number}" for number in range(8)], 6)


def write_people(cell: Path, values: NDArray[np.float64], people: NDArray[np.str_], earlier: bool = False) -> None:
    """Put the values of pairs on record in a cell, as `ablate` does, or as an earlier version did."""
    score = mean_score(values, people, PROMPTS)
    kinds = {"prompts": score.of_prompts, "annotators": score.of_annotators, "both": score.of_both}
    clusters = {kind: each._asdict() for kind, each in kinds.items()}
    line = {"metric": "adaptation/adapted/8", "mean": score.accuracy}
    line |= score.of_prompts._asdict() if earlier else clusters
    (cell / "deviations_validation.jsonl").write_text(json.dumps(line) + "\n")
    pairs = ({"prompt": p, "flipped": False, "tokens": [1, 1], "margins": {"prior": 1.0}} for p in PROMPTS)
    (cell / "pairs_validation.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    results = json.loads((cell / "results.json").read_text())
    results["metrics"] = {NAME: score.accuracy}
    (cell / "results.json").write_text(json.dumps(results))


def draw_values(people: NDArray[np.str_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw the values of a baseline, and differences that vary with prompts and annotators."""
    draw = np.random.default_rng(0)
    differences = draw.normal(size=48) + 2 * (people == "ann") + np.repeat(draw.normal(size=8), 6)
    return draw.normal(size=48), differences


def study_of(write_ablation: Callable[..., Path], people: NDArray[np.str_], earlier: bool = False) -> Study:
    """Return a study of two arms with three seeds. All seeds of an arm agree in every pair."""
    folder = write_ablation({"latent": ["none", "x"]}, [1, 2, 3], lambda latent, seed: 0.5)
    baseline, differences = draw_values(people)
    values = {"none": baseline, "x": baseline + differences}
    for cell in sorted((folder / "cells").iterdir()):
        write_people(cell, values[cell.name.partition(",")[0].removeprefix("latent=")], people, earlier)
    return make_study(load_folders([str(folder)]).records)


def test_difference_over_prompts_and_annotators(write_ablation: Callable[..., Path]) -> None:
    """Each pair of a prompt is of another annotator. Seeds agree, so that only the choice of pairs varies."""
    people = np.tile([*"abcde", "ann"], 8)
    study = study_of(write_ablation, people)
    _, differences = draw_values(people)
    by_prompt, by_person = (differences.reshape(8, 6).mean(axis) for axis in (1, 0))
    variances = [stats.sem(each) ** 2 for each in (by_prompt, by_person, differences)]
    error = (variances[0] + variances[1] - variances[2]) ** 0.5
    compared, _ = contrasts(study, [NAME], {"latent": "none"})
    (contrast,) = compared
    assert contrast.difference is not None
    expected = stats.t.interval(0.95, 5, differences.mean(), error)
    assert (contrast.difference.estimate.low, contrast.difference.estimate.high) == pytest.approx(expected, rel=1e-9)
    assert contrast.difference.p_value == pytest.approx(2 * stats.t.sf(abs(differences.mean()) / error, 5), rel=1e-9)
    (line,) = contrasts_table(study, compared, {"latent": "none"}).records
    assert (line["prompts"], line["annotators"]) == (8, 6)
    table = means_table(study, [NAME])
    assert [line["annotators"] for line in table.records] == [6, 6]
    assert any("also cover the choice of annotators" in note for note in table.notes)
    assert study.left_out([NAME]) == []


def test_few_annotators_are_named(write_ablation: Callable[..., Path]) -> None:
    study = study_of(write_ablation, np.tile(["ann", "ben", "cleo"], 16))
    estimates = [group.estimate(NAME) for group in study.groups]
    assert [(each.prompts, each.annotators) for each in estimates if each] == [(8, 0), (8, 0)]
    few = "fewer than 4 annotators, or what each of them adds is not on record"
    reasons = [entry.why for entry in study.left_out([NAME]) if entry.status == "prompts alone"]
    assert reasons == [f"{NAME}: {few}; the interval is over prompts alone"] * 2


def test_cells_of_earlier_versions_cover_prompts(write_ablation: Callable[..., Path]) -> None:
    """They have what each prompt adds alone: as with few annotators, the interval is over prompts."""
    people = np.tile([*"abcde", "ann"], 8)
    study = study_of(write_ablation, people, earlier=True)
    (contrast,), _ = contrasts(study, [NAME], {"latent": "none"})
    assert contrast.difference is not None
    by_prompt = draw_values(people)[1].reshape(8, 6).mean(1)
    assert contrast.difference.p_value == pytest.approx(stats.ttest_1samp(by_prompt, 0).pvalue, rel=1e-9)
    assert {entry.status for entry in study.left_out([NAME])} == {"prompts alone"}
