"""Tests of the plots of annotator adaptation, read from matplotlib's objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from scipy import stats

from lpc_lightning.evaluation.adaptation.plots import TITLE, draw_adaptation, score_line, to_position, to_shots
from lpc_lightning.evaluation.adaptation.scores import mean_score
from lpc_lightning.evaluation.figures import NoPlot, Plot, write_plots
from lpc_lightning.evaluation.report.adaptation_plots import annotator_adaptation
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.study import make_study
from lpc_lightning.evaluation.report.subject import Subject

SHOTS = (0, 1, 2, 4, 8, 16)


def run(name: str, seed: int, inferences: dict[str, list[float]], stage: str = "val", **others: float) -> RunRecord:
    metrics = {f"{stage}/adaptation/{name}": value for name, value in others.items()}
    for inference, values in inferences.items():
        metrics |= {f"{stage}/adaptation/{inference}/{n}": value for n, value in zip(SHOTS, values, strict=True)}
    data, _, latent = name.rpartition(",")
    axes = {"data": data, "latent": latent} if data else {"latent": latent}
    return RunRecord(f"{name},{seed}", axes, seed, metrics=metrics)


def plots(records: list[RunRecord]) -> list[Plot | NoPlot]:
    return list(annotator_adaptation(Subject(make_study(records), [], [], "", [])))


def rising(start: float) -> list[float]:
    return [start + 0.05 * index for index in range(6)]


@pytest.fixture
def records() -> list[RunRecord]:
    records = []
    for seed in (1, 2):
        records.append(run("none", seed, {"exact": [0.6] * 6}, prior=0.6, ceiling=1.0))
        records.append(
            run("marginal", seed, {"exact": rising(0.6 + 0.02 * seed)}, prior=0.62, no_latent=0.6, ceiling=1.0)
        )
        both = {"exact": rising(0.5), "amortized": rising(0.4)}
        records.append(run("gumbel", seed, both, prior=0.5, no_latent=0.5, ceiling=1.0))
    return records


def series(line: Line2D) -> tuple[list[float], list[float]]:
    return np.asarray(line.get_xdata(), float).tolist(), np.asarray(line.get_ydata(), float).tolist()


def test_annotator_adaptation_lines(records: list[RunRecord], tmp_path: Path) -> None:
    exact, amortized = plots(records)
    assert isinstance(exact, Plot)
    assert isinstance(amortized, Plot)
    (axes,) = exact.figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(n) for n in SHOTS]
    assert [axes.get_xticks()[index] for index in range(6)] == [0, 1, 2, 3, 4, 5]
    drawn = [series(line) for line in axes.lines]
    assert drawn[0] == ([0, 1, 2, 3, 4, 5], [0.6] * 6), "plain DPO"
    assert drawn[1][1] == pytest.approx(rising(0.63))
    assert drawn[2][1] == pytest.approx(rising(0.5))
    assert drawn[3] == ([0, 1], [1, 1]), "the ceiling"
    assert axes.get_ylim()[1] > 1, "the ceiling is visible"
    assert len(axes.collections) == 3, "bands"
    assert "latent none: 0.600 at 0, 0.600 at 16" in exact.alt
    assert "marginal: 0.630 at 0, 0.880 at 16" in exact.alt
    (axes,) = amortized.figure.axes
    # A policy without a latent is the floor of every inference.
    assert [series(line)[1] for line in axes.lines] == [[0.6] * 6, pytest.approx(rising(0.4)), [1, 1]]
    for plot, svg in write_plots(tmp_path, [exact, amortized]):
        assert svg.startswith(b"<?xml")
        assert (tmp_path / f"{plot.name}.png").stat().st_size > 5000
    assert {exact.name, amortized.name} == {"val_adaptation_exact", "val_adaptation_amortized"}


def test_annotator_adaptation_by_stage(records: list[RunRecord]) -> None:
    stages = plots([*records, run("marginal", 3, {"exact": rising(0.6)}, stage="test")])
    assert [plot.title.rpartition(": ")[2] for plot in stages] == ["exact, val", "amortized, val", "exact, test"]


def test_majority_labels_and_data_in_panels() -> None:
    """Each data set has a panel with its own arms and majority labels. The Gaussian latent adapts under z alone."""
    records = []
    for data, level in (("polis", 0.5), ("dices", 0.6)):
        labels = {"own_majority": rising(level)}
        records.append(run(f"{data},floor", 1, {"exact": [level] * 6, **labels}, "test", others_majority=0.7))
        gaussian = {"exact": [0.4] * 6, "amortized_z": rising(0.4), **labels}
        records.append(run(f"{data},gaussian", 1, gaussian, "test", no_latent=0.4, others_majority=0.7))
    records.append(run("dsp,floor", 1, {"exact": [0.55] * 6}, "test"))
    exact, under_z = plots(records)
    assert isinstance(under_z, Plot)
    assert (exact.title[-11:], under_z.title[-17:]) == ("exact, test", "amortized_z, test")
    drawn = {axes.get_title(): [series(line)[1] for line in axes.lines] for axes in under_z.figure.axes}
    assert drawn == {
        "data = polis": [[0.5] * 6, pytest.approx(rising(0.4)), pytest.approx(rising(0.5)), [0.7] * 2],
        "data = dices": [[0.6] * 6, pytest.approx(rising(0.4)), pytest.approx(rising(0.6)), [0.7] * 2],
        "data = dsp": [[0.55] * 6],
    }
    assert "data = polis, own majority label: 0.500 at 0, 0.750 at 16" in under_z.alt
    assert "others' majority label: 0.700 throughout" in under_z.alt


def test_groups_without_the_axis_data() -> None:
    """A grid without the axis has a panel of its own."""
    records = [run(name, 1, {"exact": [0.5] * 6}) for name in ("polis,floor", "dices,floor", "floor")]
    (plot,) = plots(records)
    assert isinstance(plot, Plot)
    assert [axes.get_title() for axes in plot.figure.axes] == ["data = polis", "data = dices", "no axis data"]


def test_labels_and_ceilings_that_differ() -> None:
    """Under label noise, majority labels are others. No ceiling is drawn that only some groups have."""
    records = [
        replace(run("none", 1, {"exact": [0.6] * 6, "own_majority": rising(level)}, ceiling=level + 0.3), axes=axes)
        for axes, level in (({"noise": 0.0}, 0.5), ({"noise": 0.4}, 0.4))
    ]
    (plot,) = plots(records)
    assert isinstance(plot, Plot)
    (axes,) = plot.figure.axes
    drawn = [series(line)[1] for line in axes.lines]
    assert drawn == [[0.6] * 6, [0.6] * 6, pytest.approx(rising(0.5)), pytest.approx(rising(0.4))]
    assert "own majority label, noise 0" in plot.alt
    assert "own majority label, noise 0.4" in plot.alt


def test_fewer_annotators_are_noted() -> None:
    """Some annotators have no 16 labels. At 1 to 8 labels all have them, and nothing is noted."""
    shares = {"exact": [0.6] * 6, "share_of_pairs": [1.0] * 5 + [0.693]}
    records = [run("polis,floor", seed, shares, "test") for seed in (1, 2)]
    records.append(run("dsp,floor", 1, {"exact": [0.5] * 6, "share_of_pairs": [1.0] * 6}, "test"))
    (plot,) = plots(records)
    assert isinstance(plot, Plot)
    assert plot.caption.endswith("Share of the pairs: 0.69 at 16.")
    (all_there,) = plots(records[2:])
    assert isinstance(all_there, Plot)
    assert "Share of the pairs" not in all_there.caption
    study = make_study(records)
    metrics = [f"test/adaptation/exact/{n}" for n in (0, 8, 16)]
    noted = [entry for entry in study.left_out(metrics) if entry.status == "fewer pairs"]
    assert [(entry.run, entry.why) for entry in noted] == [
        (
            study.label(study.groups[0]),
            "test/adaptation/exact/16: 0.69 of the pairs; annotators with fewer than 16 labels are left out",
        )
    ]


def test_annotator_adaptation_without_metrics() -> None:
    (plot,) = plots([RunRecord("r", {}, 1, metrics={"val/rewards/accuracies": 0.5})])
    assert plot == NoPlot(TITLE, "no finished run has logged adaptation/exact at two numbers of labelled pairs or more")


def test_annotator_adaptation_one_number_of_shots() -> None:
    (plot,) = plots([RunRecord("r", {}, 1, metrics={"val/adaptation/exact/8": 0.5})])
    assert isinstance(plot, NoPlot)


@pytest.mark.parametrize("shots", [0, 1, 2, 3, 16, 100])
def test_positions_double(shots: int) -> None:
    assert to_shots(to_position(shots)) == pytest.approx(shots)
    assert to_position(2 * shots) == pytest.approx(to_position(shots) + (shots > 0))


def test_score_line_intervals() -> None:
    """Student's interval over 20 prompts, with two annotators and with five. Three prompts and one have none."""
    draw, prompts = np.random.default_rng(0), np.repeat([f"p{number}" for number in range(20)], 5)
    values = draw.normal(size=100) + np.repeat(draw.normal(size=20), 5)
    two, five = np.repeat(["anna", "ben"], 50), np.tile(["anna", "ben", "cleo", "dan", "eva"], 20)
    scores = {
        0: mean_score(values, two, prompts),
        1: mean_score(values + 3 * (five == "eva"), five, prompts),
        2: mean_score(values[:15], two[:15], prompts[:15]),
        4: mean_score(values[:1], two[:1], prompts[:1]),
    }
    line = score_line("exact", scores)
    assert list(line.positions) == [0, 1, 2, 3]
    first, of_five, few, last = line.means
    error = scores[0].standard_error
    assert (first.low, first.high) == pytest.approx(stats.t.interval(0.95, 19, values.mean(), error))
    # A pair is the only one of its prompt and annotator, so that the third variance is that of single pairs.
    shifted = values + 3 * (five == "eva")
    parts = [scores[1].standard_error, scores[1].annotators_error, stats.sem(shifted)]
    error = (parts[0] ** 2 + parts[1] ** 2 - parts[2] ** 2) ** 0.5
    assert error > max(parts[:2])
    assert (of_five.low, of_five.high) == pytest.approx(stats.t.interval(0.95, 4, shifted.mean(), error))
    assert (few.low, few.high, last.low, last.high) == (None,) * 4
    figure: Any = draw_adaptation({"": [line]}, [0, 4], None, "accuracy")
    axes: Axes = figure.axes[0]
    assert axes.get_ylabel() == "accuracy"
    assert len(axes.lines) == 1
