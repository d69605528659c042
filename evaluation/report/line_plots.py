"""Line plots of a report: metrics over a numeric axis, and curves over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from lpc_lightning.evaluation.figures import NoPlot, Plot, add_light_grid
from lpc_lightning.evaluation.line_panels import Line, describe_cut, describe_lines, draw_panels
from lpc_lightning.evaluation.report.runs.records import Curve, RunRecord
from lpc_lightning.evaluation.report.study import Group, Study
from lpc_lightning.evaluation.report.subject import Drawn, Subject, file_name
from lpc_lightning.evaluation.statistics.seeds import estimate

LOSS, MEMORIZATION = "train/loss", "train/noise/flipped/accuracy_true"
"""The second is the accuracy on pairs with a flipped label, by the true label. It falls if a policy memorizes noise."""
CODEBOOK = ("val/latent/codebook_perplexity", "val/latent/dead_codes", "val/mutual_information/factor")
"""Metrics of how the codebook is used."""
MAX_LINES = 7
"""Most lines in one panel. More lines are spread over several panels."""
MAX_POINTS = 40
"""Most points of a curve. Neighbours in a longer curve are averaged."""
BAND = (
    "Bands: the 95 % interval of the mean over seeds; one seed and too few test prompts have none. "
    "Bands much wider than the distance between the lines are cropped."
)


def against_axes(subject: Subject) -> Drawn:
    """Plot each metric over each numeric axis: one line with its band for each method."""
    if not subject.numeric_axes:
        yield NoPlot("Accuracy against a rate or a size", "no axis has two numbers or more")
    for axis in subject.numeric_axes:
        for metric in subject.metrics:
            yield _against(subject.study, axis, metric)


def _against(study: Study, axis: str, metric: str) -> Plot | NoPlot:
    title = f"{metric} against {axis}"
    panels = spread_panels(study, study.groups, (axis,), lambda label, groups: _axis_line(label, groups, axis, metric))
    if not any(line.level is None for lines in panels.values() for line in lines):
        return NoPlot(title, f"no finished run with a value of {axis} has logged {metric}")
    figure, grid = draw_panels(panels, True, axis, metric)
    values = [float(value) for value in study.axes[axis]]
    for axes in grid:
        add_light_grid(axes)
        _set_scale(axes, values)
    caption = f"Mean over seeds. {BAND} A line without markers: runs to which {axis} does not apply."
    caption += describe_cut(panels)
    return Plot(file_name(f"{metric}_by_{axis}"), title, figure, describe_lines(title, panels), caption)


def _axis_line(label: str, groups: Sequence[Group], axis: str, metric: str) -> Line | None:
    means = [(group, mean) for group in groups if (mean := group.estimate(metric)) is not None]
    points = sorted(
        ((float(group.axes[axis]), mean) for group, mean in means if axis in group.axes), key=lambda point: point[0]
    )
    if points:
        return Line(label, [position for position, _ in points], [mean for _, mean in points])
    return Line(label, (), (), level=means[0][1]) if means else None


def _set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Use a scale of powers of two for values over three doublings or more, and a tick for each of up to 8 values."""
    if min(values) > 0 and max(values) / min(values) >= 8:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])


def training_curves(subject: Subject) -> Drawn:
    """Plot the report's metrics, the training loss and the memorization of noise over the optimizer steps."""
    for metric in (*subject.metrics, LOSS, MEMORIZATION):
        yield _curves(subject.study, metric, f"{metric} over training")


def codebook_use(subject: Subject) -> Drawn:
    """Plot the metrics of codebook use over the optimizer steps."""
    for metric in CODEBOOK:
        yield _curves(subject.study, metric, f"Codebook use: {metric} over training")


def _curves(study: Study, metric: str, title: str) -> Plot | NoPlot:
    groups = [group for group in study.groups if _with_curve(group, metric)]
    panels = spread_panels(study, groups, (), lambda label, members: _curve_line(label, members, metric))
    if not panels:
        return NoPlot(title, f"no finished run has logged {metric} at two steps or more")
    figure, grid = draw_panels(panels, False, "optimizer steps", metric)
    for axes in grid:
        add_light_grid(axes)
    caption = f"Mean over seeds at the steps that all of them logged. {BAND} They cover seeds, not prompts."
    longest = max(len(record.curves[metric].steps) for group in groups for record in _with_curve(group, metric))
    if longest > MAX_POINTS:
        caption += f" Neighbouring steps are averaged to {MAX_POINTS} points."
    caption += describe_cut(panels)
    return Plot(file_name(f"{metric}_curve"), title, figure, describe_lines(title, panels), caption)


def _with_curve(group: Group, metric: str) -> list[RunRecord]:
    return [record for record in group.counted if metric in record.curves and len(record.curves[metric].steps) > 1]


def _curve_line(label: str, groups: Sequence[Group], metric: str) -> Line | None:
    curves = [record.curves[metric] for group in groups for record in _with_curve(group, metric)]
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    if not steps:
        return None
    values = np.array([_values_at(curve, steps) for curve in curves])
    chunks = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))
    positions = [float(np.mean([steps[index] for index in chunk])) for chunk in chunks]
    return Line(label, positions, [estimate(values[:, chunk].mean(1).tolist()) for chunk in chunks])


def _values_at(curve: Curve, steps: Sequence[int]) -> list[float]:
    by_step = dict(zip(curve.steps, curve.values, strict=True))
    return [by_step[step] for step in steps]


def spread_panels(
    study: Study,
    groups: Sequence[Group],
    without: tuple[str, ...],
    make_line: Callable[[str, Sequence[Group]], Line | None],
) -> dict[str, list[Line]]:
    """Make lines by panel. Many lines get one panel for each value of the axis that has the most values.

    Args:
        study: All groups, with their axes.
        groups: The groups to draw.
        without: Axes that are not part of a line's label.
        make_line: Makes the line of a label and its groups. None: nothing to draw.

    Returns:
        Lines by the panel's title, which is empty for a single panel. Panels without lines are left out.
    """
    others = [axis for axis in study.axes if axis not in without]
    labels = {study.label(group, *without) for group in groups}
    spread = max(others, key=lambda axis: len(study.axes[axis]), default=None) if len(labels) > MAX_LINES else None
    hidden = (*without, spread) if spread else without
    members: dict[str, dict[str, list[Group]]] = {}
    for group in groups:
        panel = f"{spread} = {group.axes.get(spread, 'none')}" if spread else ""
        members.setdefault(panel, {}).setdefault(study.label(group, *hidden), []).append(group)
    panels = {
        panel: [
            line for label, label_groups in labelled.items() if (line := make_line(label, label_groups)) is not None
        ]
        for panel, labelled in members.items()
    }
    return {panel: lines for panel, lines in panels.items() if lines}
