"""Tests of the plots, read from matplotlib's objects: content, positions, and that all of it fits in the image."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
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
from lpc_lightning.evaluation.report.plots import PLOT_FUNCTIONS, draw
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
    compared, _ = contrasts(study, [METRIC], baseline or {})
    return Subject(study, [METRIC], compared, "the baseline", numeric_axes(study))


def grid(**axes: list[Any]) -> list[RunRecord]:
    names = list(axes)
    records = []
    for index in np.ndindex(*(len(values) for values in axes.values())):
        cell = {name: axes[name][position] for name, position in zip(names, index, strict=True)}
        records += [run(seed, 0.5 + 0.01 * sum(index) + 0.02 * seed, **cell) for seed in (1, 2, 3)]
    return records


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def x_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata(), dtype=float).tolist()


def y_of(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata(), dtype=float).tolist()


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def drawn(plot: Plot | NoPlot, folder: Path) -> Plot:
    """Write a plot, and check its image, texts and SVG: complete, not empty, described, and without external links."""
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
    links = [value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    return plot


def test_against_axes_line_and_band(tmp_path: Path) -> None:
    plots = list(against_axes(subject(grid(latent=["none", "x"], noise=[0.0, 0.1, 0.4]))))
    plot = drawn(plots[0], tmp_path)
    (axes,) = panels(plot.figure)
    assert len(plots) == 1
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


def test_against_axes_one_seed_has_no_band(tmp_path: Path) -> None:
    records = [run(1, 0.5 + noise, noise=noise) for noise in (0.0, 0.1)]
    (axes,) = panels(drawn(next(against_axes(subject(records))), tmp_path).figure)
    assert len(axes.lines) == 1
    assert not axes.collections


def test_against_axes_of_sizes_is_logarithmic(tmp_path: Path) -> None:
    records = [*grid(latent=["marginal"], codes=[8, 16, 64, 256]), run(1, 0.4, latent="none")]
    plot = drawn(next(against_axes(subject(records))), tmp_path)
    (axes,) = panels(plot.figure)
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "64", "256"]
    # Runs without codes are drawn as a level.
    levels = [line for line in axes.lines if y_of(line) == [0.4, 0.4]]
    assert len(levels) == 1
    assert "latent none: 0.400 throughout" in plot.alt


def test_many_lines_are_spread_over_panels(tmp_path: Path) -> None:
    records = grid(algorithm=["DPO", "IPO", "SimPO"], latent=["none", "gumbel", "marginal"], noise=[0.0, 0.5])
    plot = drawn(next(against_axes(subject(records))), tmp_path)
    grid_axes = panels(plot.figure)
    assert [axes.get_title() for axes in grid_axes] == ["algorithm = DPO", "algorithm = IPO", "algorithm = SimPO"]
    assert [len(axes.lines) for axes in grid_axes] == [3, 3, 3]
    assert legend(plot.figure) == ["latent none", "gumbel", "marginal"]
    for index in range(3):
        assert len({axes.lines[index].get_color() for axes in grid_axes}) == 1


def test_more_lines_than_styles() -> None:
    assert len({style[:2] for style in STYLES}) == len(STYLES) == 28
    records = [run(1, 0.5, one=one, two=f"b{n}", noise=noise) for one in "xy" for n in range(30) for noise in (0, 1)]
    records += [run(1, 0.5, one=f"a{n}", two="b0", noise=noise) for n in range(30) for noise in (0, 1)]
    plot = next(against_axes(subject(records)))
    assert isinstance(plot, Plot)
    assert len(legend(plot.figure)) == 28
    assert "The first 28 of " in plot.caption


def test_training_curves_use_common_steps(tmp_path: Path) -> None:
    first, second = {0: 0.5, 10: 0.6, 20: 0.7}, {0: 0.6, 10: 0.8}
    records = [run(1, 0.7, first, latent="a"), run(2, 0.8, second, latent="a"), run(1, 0.5, first, latent="b")]
    curve, loss, _ = training_curves(subject(records))
    (axes,) = panels(drawn(curve, tmp_path).figure)
    assert x_of(axes.lines[0]) == [0, 10]
    assert y_of(axes.lines[0]) == pytest.approx([0.55, 0.7])
    assert x_of(axes.lines[1]) == [0, 10, 20]
    assert len(axes.collections) == 1
    assert loss == NoPlot("train/loss over training", "no finished run has logged train/loss at two steps or more")


def test_training_curves_average_neighbours(tmp_path: Path) -> None:
    steps = {step: step / 1000 for step in range(1000)}
    curve, *_ = training_curves(subject([run(1, 0.5, steps)]))
    plot = drawn(curve, tmp_path)
    (line,) = panels(plot.figure)[0].lines
    assert len(x_of(line)) == MAX_POINTS
    assert x_of(line)[0] == pytest.approx(12.0)
    assert y_of(line)[0] == pytest.approx(0.012)
    assert f"averaged to {MAX_POINTS} points" in plot.caption


@pytest.mark.parametrize("deviation", [0.001, 2.0], ids=["narrow", "wide"])
def test_wide_bands_are_cropped(tmp_path: Path, deviation: float) -> None:
    records = [
        RunRecord(
            f"{latent}{seed}", {"latent": latent}, seed, curves={"train/loss": Curve((0, 10), (level, level + side))}
        )
        for latent, level in (("none", 0.0), ("x", 1.0))
        for seed, side in ((1, -deviation), (2, deviation))
    ]
    plot = drawn(list(training_curves(subject(records)))[-2], tmp_path)
    (axes,) = panels(plot.figure)
    bottom, top = axes.get_ylim()
    if deviation == 2.0:
        assert (bottom, top) == (-1, 2)
    else:
        assert -0.1 < bottom < 0 < 1 < top < 1.1


def test_codebook_use(tmp_path: Path) -> None:
    perplexity = Curve((0, 10), (8.0, 4.0))
    record = RunRecord("r", {}, 1, curves={"val/latent/codebook_perplexity": perplexity})
    first, *others = codebook_use(subject([record]))
    assert y_of(panels(drawn(first, tmp_path).figure)[0].lines[0]) == [8, 4]
    assert all(isinstance(plot, NoPlot) for plot in others)


def test_means_plot(tmp_path: Path) -> None:
    plot = drawn(next(means(subject(grid(latent=["none", "x"])))), tmp_path)
    (axes,) = panels(plot.figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["latent none", "x"]
    dots = [line for line in axes.lines if len(x_of(line)) == 3]
    assert x_of(dots[0]) == pytest.approx([0.52, 0.54, 0.56])
    # The first group is at the top.
    bottom, top = axes.get_ylim()
    assert bottom > top


def test_differences_fill_significant_ones(give_own_prompts: Callable[..., list[RunRecord]], tmp_path: Path) -> None:
    records = [run(seed, 0.5 + 0.001 * seed, latent="none") for seed in (1, 2, 3, 4, 5)]
    records += [run(seed, 0.6 + 0.0011 * seed, latent="sure") for seed in (1, 2, 3, 4, 5)]
    records += [run(seed, 0.5 + 0.1 * (-1) ** seed, latent="unsure") for seed in (1, 2, 3, 4, 5)]
    plot = drawn(next(differences(subject(give_own_prompts(records), {"latent": "none"}))), tmp_path)
    (axes,) = panels(plot.figure)
    fills = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"]
    assert [fill == "white" for fill in fills] == [False, True]


def test_costs_panels(tmp_path: Path) -> None:
    plot = drawn(next(costs(subject(grid(latent=["none", "x"], noise=[0, 1])))), tmp_path)
    assert [axes.get_xlabel() for axes in panels(plot.figure)] == ["seconds", "peak memory (GiB)"]
    assert legend(plot.figure) == ["latent none", "x"]
    assert "latent none, noise 0: 0.540, 5.4 s, 1.00 GiB" in plot.alt


def test_costs_of_more_groups_than_styles(tmp_path: Path) -> None:
    """A group with another value of a number shares the style of the others."""
    records = grid(latent=[f"a{number}" for number in range(28)], noise=[0, 1])
    assert "are shown" not in drawn(next(costs(subject(records))), tmp_path).caption
    records = grid(latent=[f"a{number}" for number in range(31)], noise=[0, 1])
    assert drawn(next(costs(subject(records))), tmp_path).caption.endswith("The first 56 of 62 are shown.")


def test_draw_lists_plots_without_data() -> None:
    plots, others = draw(subject([run(1, 0.5, cost=False)]))
    assert [plot.name for plot in plots] == ["val_rewards_accuracies_means"]
    assert [plot.title for plot in others] == [
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
    assert all(plot.reason for plot in others)
    plots, others = draw(subject([RunRecord("r", {"noise": noise}, 1, "failed") for noise in (0, 1)]))
    assert plots == []
    assert len(others) >= len(PLOT_FUNCTIONS)


def test_long_names_and_formulas_are_text(tmp_path: Path) -> None:
    names = ["x" * 200, "$\\frac{1$", "a_b^c", "说明", "$" * 200, "\\$x$ and \\$y$"]
    plot = drawn(next(means(subject(grid(latent=names)))), tmp_path)
    labels = [label.get_text() for label in panels(plot.figure)[0].get_yticklabels()]
    assert max(map(len, labels)) <= 65
    assert labels[1] == shorten(names[1]) == names[1]


def test_dollar_signs_in_axes_and_values_are_text(tmp_path: Path) -> None:
    axes: dict[str, list[Any]] = {"$\\frac{$": ["$\\x$", "\\$y$z$"], "$rate$": [1, 2, 4, 16], "$^$": ["a", "b"]}
    records = [replace(each, curves={METRIC: Curve((1, 2), (0.5, 0.6))}) for each in grid(**axes)]
    plots, _ = draw(subject(records, {"$\\frac{$": "$\\x$"}))
    assert len(plots) == len(list(write_plots(tmp_path, plots))) >= 5
    assert {path.parent for path in tmp_path.rglob("*")} == {tmp_path}


def test_to_svg_is_reproducible() -> None:
    one, other = (next(means(subject(grid(latent=["none", "x"])))) for _ in range(2))
    assert isinstance(one, Plot)
    assert isinstance(other, Plot)
    assert to_svg(one.figure) == to_svg(other.figure)
    ET.parse(io.BytesIO(to_svg(one.figure)))
