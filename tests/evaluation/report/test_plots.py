"""Plots are read as matplotlib holds them: what is drawn, where, and that all of it fits on the page."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from lpc_lightning.evaluation.figures import STYLES, NoPlot, Plot, shorten, to_svg, write_plots
from lpc_lightning.evaluation.report.contrasts import contrasts
from lpc_lightning.evaluation.report.group_plots import costs, differences, means
from lpc_lightning.evaluation.report.line_plots import MAX_POINTS, against_axes, codebook_use, training_curves
from lpc_lightning.evaluation.report.plots import MAKERS, draw
from lpc_lightning.evaluation.report.runs.records import Curve, RunRecord
from lpc_lightning.evaluation.report.study import make_study
from lpc_lightning.evaluation.report.subject import Subject, numeric_axes
from lpc_lightning.evaluation.statistics.seeds import estimate

METRIC = "val/rewards/accuracies"


def run(seed: int, value: float, curve: dict[int, float] | None = None, cost: bool = True, **axes: Any) -> RunRecord:
    curves = {METRIC: Curve(tuple(curve), tuple(curve.values()))} if curve else {}
    seconds, peak = (10.0 * value, 2.0**30) if cost else (None, None)
    name = f"{axes},{seed}"
    return RunRecord(name, axes, seed, metrics={METRIC: value}, curves=curves, seconds=seconds, peak_bytes=peak)


def subject(records: list[RunRecord], baseline: dict[str, Any] | None = None) -> Subject:
    study = make_study(records)
    found, _ = contrasts(study, [METRIC], baseline or {})
    return Subject(study, [METRIC], found, "the baseline", numeric_axes(study))


def grid(**axes: list[Any]) -> list[RunRecord]:
    names = list(axes)
    records = []
    for place in np.ndindex(*(len(values) for values in axes.values())):
        cell = {name: axes[name][each] for name, each in zip(names, place, strict=True)}
        records += [run(seed, 0.5 + 0.01 * sum(place) + 0.02 * seed, **cell) for seed in (1, 2, 3)]
    return records


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def x_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata(), dtype=float).tolist()


def y_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata(), dtype=float).tolist()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def drawn(plot: Plot | NoPlot, folder: Path) -> Plot:
    """The plot, after a look at what any picture must be: whole, not empty, told in words, and SVG by itself."""
    assert isinstance(plot, Plot)
    ((_, svg),) = write_plots(folder, [plot])
    pixels = np.asarray(Image.open(folder / f"{plot.name}.png").convert("RGB"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()
    assert (pixels != 255).any(-1).mean() > 0.005
    assert plot.title
    assert plot.caption.endswith(".")
    assert plot.alt.startswith(plot.title)
    root = ET.fromstring((folder / f"{plot.name}.svg").read_text())
    assert svg == (folder / f"{plot.name}.svg").read_bytes()
    links = [value for each in root.iter() for name, value in each.attrib.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    return plot


def test_a_line_is_means_and_its_band_their_intervals(tmp_path: Path) -> None:
    found = list(against_axes(subject(grid(latent=["none", "x"], noise=[0.0, 0.1, 0.4]))))
    plot = drawn(found[0], tmp_path)
    (axes,) = panels(plot.figure)
    assert len(found) == 1
    assert legend(plot.figure) == ["latent none", "x"]
    first, second = axes.lines
    assert x_of(first) == [0, 0.1, 0.4]
    assert y_of(second) == pytest.approx([0.55, 0.56, 0.57])
    expected = estimate([0.52, 0.54, 0.56])
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    at_zero = sorted({round(y, 9) for x, y in band.tolist() if x == 0})
    assert at_zero == pytest.approx([expected.low, expected.high])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("noise", METRIC, "linear")
    assert "latent none: 0.540 at 0, 0.560 at 0.4" in plot.alt


def test_one_seed_has_no_band(tmp_path: Path) -> None:
    records = [run(1, 0.5 + noise, noise=noise) for noise in (0.0, 0.1)]
    (axes,) = panels(drawn(next(against_axes(subject(records))), tmp_path).figure)
    assert len(axes.lines) == 1
    assert not axes.collections


def test_sizes_stand_on_powers_of_two(tmp_path: Path) -> None:
    records = [*grid(latent=["marginal"], codes=[8, 16, 64, 256]), run(1, 0.4, latent="none")]
    plot = drawn(next(against_axes(subject(records))), tmp_path)
    (axes,) = panels(plot.figure)
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "64", "256"]
    # The runs without codes are a level.
    levels = [line for line in axes.lines if y_of(line) == [0.4, 0.4]]
    assert len(levels) == 1
    assert "latent none: 0.400 throughout" in plot.alt


def test_many_lines_are_spread_over_panels(tmp_path: Path) -> None:
    records = grid(algorithm=["DPO", "IPO", "SimPO"], latent=["none", "gumbel", "marginal"], noise=[0.0, 0.5])
    plot = drawn(next(against_axes(subject(records))), tmp_path)
    found = panels(plot.figure)
    assert [axes.get_title() for axes in found] == ["algorithm = DPO", "algorithm = IPO", "algorithm = SimPO"]
    assert [len(axes.lines) for axes in found] == [3, 3, 3]
    assert legend(plot.figure) == ["latent none", "gumbel", "marginal"]
    for place in range(3):
        assert len({axes.lines[place].get_color() for axes in found}) == 1


def test_each_of_28_lines_has_a_look_of_its_own_and_more_are_told() -> None:
    assert len({look[:2] for look in STYLES}) == len(STYLES) == 28
    records = [run(1, 0.5, one=one, two=f"b{n}", noise=noise) for one in "xy" for n in range(30) for noise in (0, 1)]
    records += [run(1, 0.5, one=f"a{n}", two="b0", noise=noise) for n in range(30) for noise in (0, 1)]
    plot = next(against_axes(subject(records)))
    assert isinstance(plot, Plot)
    assert len(legend(plot.figure)) == 28
    assert "The first 28 of " in plot.caption


def test_curves_are_means_at_the_steps_that_all_seeds_have(tmp_path: Path) -> None:
    first, second = {0: 0.5, 10: 0.6, 20: 0.7}, {0: 0.6, 10: 0.8}
    records = [run(1, 0.7, first, latent="a"), run(2, 0.8, second, latent="a"), run(1, 0.5, first, latent="b")]
    curve, loss, _ = training_curves(subject(records))
    (axes,) = panels(drawn(curve, tmp_path).figure)
    assert x_of(axes.lines[0]) == [0, 10]
    assert y_of(axes.lines[0]) == pytest.approx([0.55, 0.7])
    assert x_of(axes.lines[1]) == [0, 10, 20]
    assert len(axes.collections) == 1
    assert loss == NoPlot("train/loss over training", "no finished run has logged train/loss at two steps or more")


def test_long_curves_are_averaged(tmp_path: Path) -> None:
    steps = {step: step / 1000 for step in range(1000)}
    curve, *_ = training_curves(subject([run(1, 0.5, steps)]))
    plot = drawn(curve, tmp_path)
    (line,) = panels(plot.figure)[0].lines
    assert len(x_of(line)) == MAX_POINTS
    assert x_of(line)[0] == pytest.approx(12.0)
    assert y_of(line)[0] == pytest.approx(0.012)
    assert f"averaged to {MAX_POINTS} points" in plot.caption


@pytest.mark.parametrize("spread", [0.001, 2.0], ids=["narrow", "wide"])
def test_a_wide_band_does_not_flatten_the_lines(tmp_path: Path, spread: float) -> None:
    records = [
        RunRecord(
            f"{latent}{seed}", {"latent": latent}, seed, curves={"train/loss": Curve((0, 10), (level, level + side))}
        )
        for latent, level in (("none", 0.0), ("x", 1.0))
        for seed, side in ((1, -spread), (2, spread))
    ]
    plot = drawn(list(training_curves(subject(records)))[-2], tmp_path)
    (axes,) = panels(plot.figure)
    bottom, top = axes.get_ylim()
    if spread == 2.0:
        assert (bottom, top) == (-1, 2)
    else:
        assert -0.1 < bottom < 0 < 1 < top < 1.1


def test_the_use_of_the_codebook_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    perplexity = Curve((0, 10), (8.0, 4.0))
    record = RunRecord("r", {}, 1, curves={"val/latent/codebook_perplexity": perplexity})
    first, *others = codebook_use(subject([record]))
    assert y_of(panels(drawn(first, tmp_path).figure)[0].lines[0]) == [8, 4]
    assert all(isinstance(each, NoPlot) for each in others)


def test_means_show_every_group_and_every_seed(tmp_path: Path) -> None:
    plot = drawn(next(means(subject(grid(latent=["none", "x"])))), tmp_path)
    (axes,) = panels(plot.figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["latent none", "x"]
    dots = [line for line in axes.lines if len(x_of(line)) == 3]
    assert x_of(dots[0]) == pytest.approx([0.52, 0.54, 0.56])
    # The first group stands at the top.
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_differences_are_filled_where_they_are_significant(tmp_path: Path) -> None:
    records = [run(seed, 0.5 + 0.001 * seed, latent="none") for seed in (1, 2, 3, 4)]
    records += [run(seed, 0.6 + 0.0011 * seed, latent="sure") for seed in (1, 2, 3, 4)]
    records += [run(seed, 0.5 + 0.1 * (-1) ** seed, latent="unsure") for seed in (1, 2, 3, 4)]
    plot = drawn(next(differences(subject(records, {"latent": "none"}))), tmp_path)
    (axes,) = panels(plot.figure)
    fills = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert [fill == "white" for fill in fills] == [False, True]


def test_cost_has_a_panel_for_time_and_one_for_memory(tmp_path: Path) -> None:
    plot = drawn(next(costs(subject(grid(latent=["none", "x"], noise=[0, 1])))), tmp_path)
    assert [axes.get_xlabel() for axes in panels(plot.figure)] == ["seconds", "peak memory (GiB)"]
    assert legend(plot.figure) == ["latent none", "x"]
    assert "latent none, noise 0: 0.540, 5.4 s, 1.00 GiB" in plot.alt


def test_what_has_no_data_is_told() -> None:
    plots, others = draw(subject([run(1, 0.5, cost=False)]))
    assert [plot.name for plot in plots] == ["val_rewards_accuracies_means"]
    assert [each.title for each in others] == [
        "Differences to a baseline",
        "Accuracy against a rate or a size",
        f"{METRIC} over training",
        "train/loss over training",
        "train/noise/flipped/accuracy_true over training",
        "Codebook use: val/latent/codebook_perplexity over training",
        "Codebook use: val/latent/dead_codes over training",
        "Codebook use: val/mutual_information/factor over training",
        "Accuracy on an annotator's pairs, given others of the same annotator",
        f"{METRIC} against time and memory",
    ]
    assert all(each.reason for each in others)
    plots, others = draw(subject([RunRecord("r", {"noise": noise}, 1, "failed") for noise in (0, 1)]))
    assert plots == []
    assert len(others) >= len(MAKERS)


def test_long_names_and_formulas_stay_text(tmp_path: Path) -> None:
    names = ["x" * 200, "$\\frac{1$", "a_b^c", "说明"]
    plot = drawn(next(means(subject(grid(latent=names)))), tmp_path)
    labels = [label.get_text() for label in panels(plot.figure)[0].get_yticklabels()]
    assert max(map(len, labels)) <= 65
    assert labels[1] == shorten(names[1]) == "\\$\\frac{1\\$"


def test_the_same_figure_is_the_same_file() -> None:
    one, other = (next(means(subject(grid(latent=["none", "x"])))) for _ in range(2))
    assert isinstance(one, Plot)
    assert isinstance(other, Plot)
    assert to_svg(one.figure) == to_svg(other.figure)
    ET.parse(io.BytesIO(to_svg(one.figure)))
