"""Plots of lines: metrics against an axis of numbers, and curves over training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, ScalarFormatter

from lpc_lightning.evaluation.figures import LOOKS, MOST_LINES, Line, NoPlot, Plot, draw_panels, quiet_grid
from lpc_lightning.evaluation.report.runs.records import Curve, RunRecord
from lpc_lightning.evaluation.report.study import Group, Study
from lpc_lightning.evaluation.report.subject import MOST_ALT, Drawn, Subject, file_name, told_mean
from lpc_lightning.evaluation.statistics.seeds import estimate

LOSS, MEMORISING = "train/loss", "train/noise/flipped/accuracy_true"
"""Of pairs with a wrong label, the accuracy by the true one falls where a policy memorises noise."""
CODEBOOK = ("val/latent/codebook_perplexity", "val/latent/dead_codes", "val/mutual_information/factor")
"""What tells how a codebook is used."""
MOST_POINTS = 40
"""Points of a curve; of a longer one, neighbours are averaged."""
BAND = (
    "Bands: Student's 95 % interval of the mean over seeds; one seed has none. "
    "Those far wider than the lines are apart are cut."
)


def against_axes(subject: Subject) -> Drawn:
    """Each metric against each axis of numbers: a line a method, with bands."""
    if not subject.along:
        yield NoPlot("Accuracy against a rate or a size", "no axis has two numbers or more")
    for axis in subject.along:
        for metric in subject.metrics:
            yield _against(subject.study, axis, metric)


def _against(study: Study, axis: str, metric: str) -> Plot | NoPlot:
    title = f"{metric} against {axis}"
    panels = spread_panels(study, study.groups, (axis,), lambda label, groups: _line(label, groups, axis, metric))
    if not any(line.level is None for lines in panels.values() for line in lines):
        return NoPlot(title, f"no finished run with a value of {axis} has logged {metric}")
    figure, grid = draw_panels(panels, True, axis, metric)
    values = [float(value) for value in study.axes[axis]]
    for axes in grid:
        quiet_grid(axes)
        _scale(axes, values)
    caption = f"Mean over seeds. {BAND} A line without markers: runs to which {axis} does not apply."
    return Plot(file_name(f"{metric}_by_{axis}"), title, figure, in_words(title, panels), caption + told_cut(panels))


def _line(label: str, groups: Sequence[Group], axis: str, metric: str) -> Line | None:
    found = [(group, mean) for group in groups if (mean := group.estimate(metric)) is not None]
    placed = sorted(
        ((float(group.axes[axis]), mean) for group, mean in found if axis in group.axes), key=lambda each: each[0]
    )
    if placed:
        return Line(label, [place for place, _ in placed], [mean for _, mean in placed])
    return Line(label, (), (), level=found[0][1]) if found else None


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Powers of two where sizes go over three doublings or more; a tick at each value where they fit."""
    if min(values) > 0 and max(values) / min(values) >= 8:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    if len(values) <= 8:
        axes.set_xticks(values, [f"{value:g}" for value in values])


# Training curves and the use of the codebook


def training_curves(subject: Subject) -> Drawn:
    """Metrics and what training says over the steps."""
    for metric in (*subject.metrics, LOSS, MEMORISING):
        yield _curves(subject.study, metric, f"{metric} over training")


def codebook_use(subject: Subject) -> Drawn:
    """What the codebook does over the steps."""
    for metric in CODEBOOK:
        yield _curves(subject.study, metric, f"Codebook use: {metric} over training")


def _curves(study: Study, metric: str, title: str) -> Plot | NoPlot:
    groups = [group for group in study.groups if _with_curve(group, metric)]
    panels = spread_panels(study, groups, (), lambda label, found: _curve_line(label, found, metric))
    if not panels:
        return NoPlot(title, f"no finished run has logged {metric} at two steps or more")
    figure, grid = draw_panels(panels, False, "optimizer steps", metric)
    for axes in grid:
        quiet_grid(axes)
    caption = f"Mean over seeds at the steps that all of them logged. {BAND}"
    longest = max(len(each.curves[metric].steps) for group in groups for each in _with_curve(group, metric))
    if longest > MOST_POINTS:
        caption += f" Neighbouring steps are averaged to {MOST_POINTS} points."
    return Plot(file_name(f"{metric}_curve"), title, figure, in_words(title, panels), caption + told_cut(panels))


def _with_curve(group: Group, metric: str) -> list[RunRecord]:
    return [each for each in group.counted if metric in each.curves and len(each.curves[metric].steps) > 1]


def _curve_line(label: str, groups: Sequence[Group], metric: str) -> Line | None:
    curves = [each.curves[metric] for group in groups for each in _with_curve(group, metric)]
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves)))
    if not steps:
        return None
    values = np.array([_at(curve, steps) for curve in curves])
    pieces = np.array_split(np.arange(len(steps)), min(len(steps), MOST_POINTS))
    places = [float(np.mean([steps[each] for each in piece])) for piece in pieces]
    return Line(label, places, [estimate(values[:, piece].mean(1).tolist()) for piece in pieces])


def _at(curve: Curve, steps: Sequence[int]) -> list[float]:
    known = dict(zip(curve.steps, curve.values, strict=True))
    return [known[step] for step in steps]


# In common


def spread_panels(
    study: Study,
    groups: Sequence[Group],
    without: tuple[str, ...],
    line: Callable[[str, Sequence[Group]], Line | None],
) -> dict[str, list[Line]]:
    """Lines by panel: one panel, or one for each value of the axis with most values, where there are many lines."""
    others = [axis for axis in study.axes if axis not in without]
    labels = {study.label(group, *without) for group in groups}
    spread = max(others, key=lambda axis: len(study.axes[axis]), default=None) if len(labels) > MOST_LINES else None
    hidden = (*without, spread) if spread else without
    members: dict[str, dict[str, list[Group]]] = {}
    for group in groups:
        panel = f"{spread} = {group.axes.get(spread, 'none')}" if spread else ""
        members.setdefault(panel, {}).setdefault(study.label(group, *hidden), []).append(group)
    found = {
        panel: [each for label, of in lines.items() if (each := line(label, of)) is not None]
        for panel, lines in members.items()
    }
    return {panel: lines for panel, lines in found.items() if lines}


def told_cut(panels: Mapping[str, Sequence[Line]]) -> str:
    """A sentence where there are more lines than looks."""
    labels = {line.label for lines in panels.values() for line in lines}
    return f" The first {len(LOOKS)} of {len(labels)} lines are shown." if len(labels) > len(LOOKS) else ""


def in_words(title: str, panels: Mapping[str, Sequence[Line]], at: Callable[[float], float] = float) -> str:
    """A plot's ends, line by line; `at` makes the number that is told of a place on the horizontal axis."""
    told = []
    for panel, lines in panels.items():
        for line in lines:
            name = f"{panel}, {line.label}" if panel else line.label
            if line.level is not None:
                told.append(f"{name}: {told_mean(line.level)} throughout")
            else:
                first, last = at(line.places[0]), at(line.places[-1])
                told.append(f"{name}: {told_mean(line.means[0])} at {first:g}, {told_mean(line.means[-1])} at {last:g}")
    more = "; and more, which the tables have" if len(told) > MOST_ALT else ""
    return f"{title}. {'; '.join(told[:MOST_ALT])}{more}."
