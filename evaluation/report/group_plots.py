"""Plots with one mark for each group: means, differences to a baseline, and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist

from lpc_lightning.evaluation.comparison.comparison import SIGNIFICANCE
from lpc_lightning.evaluation.figures import (
    COLOURS,
    GREY,
    STYLES,
    NoPlot,
    Plot,
    add_legend,
    add_light_grid,
    legend_height,
    make_figure,
    shorten,
)
from lpc_lightning.evaluation.line_panels import MAX_DESCRIBED, format_mean
from lpc_lightning.evaluation.report.contrasts import MIN_SEEDS
from lpc_lightning.evaluation.report.subject import Drawn, Subject, file_name, numeric_axes
from lpc_lightning.evaluation.report.tables import cost
from lpc_lightning.evaluation.statistics.seeds import Estimate

MAX_ROWS = 80
"""Most groups in one figure of means."""


def means(subject: Subject) -> Drawn:
    """Plot the mean of every group with its interval and the values of its seeds."""
    for metric in subject.metrics:
        title = f"{metric} of each group"
        estimates = [(group, mean) for group in subject.study.groups if (mean := group.estimate(metric))]
        if not estimates:
            yield NoPlot(title, f"no finished run has logged {metric}")
            continue
        rows = [
            _Row(subject.study.label(group), mean, [value for _, value in group.values(metric)])
            for group, mean in estimates
        ]
        caption = "Point and bar: mean over seeds and its 95 % interval. Small dots: single seeds."
        yield _forest_plot(f"{metric}_means", title, metric, rows, caption)


def differences(subject: Subject) -> Drawn:
    """Plot the difference between every group and its baseline, with its interval."""
    if not subject.contrasts:
        yield NoPlot(
            "Differences to a baseline", "no baseline was chosen (--baseline AXIS=VALUE), or no group has a baseline"
        )
    for metric in subject.metrics if subject.contrasts else ():
        title = f"{metric}: difference to {subject.baseline}"
        rows = [
            _Row(
                subject.study.label(contrast.group),
                contrast.difference.estimate,
                filled=contrast.is_significant,
            )
            for contrast in subject.contrasts
            if contrast.metric == metric and contrast.difference
        ]
        if not rows:
            yield NoPlot(title, "no group has a seed in common with its baseline")
            continue
        caption = (
            "Mean difference under the same seeds, with its 95 % interval. Filled: significant at "
            f"{SIGNIFICANCE} after Holm's correction, over at least {MIN_SEEDS} seeds. Without a bar: one pair of "
            "runs, or too few test prompts."
        )
        yield _forest_plot(f"{metric}_differences", title, f"difference in {metric}", rows, caption, zero_line=True)


@dataclass(frozen=True)
class _Row:
    label: str
    mean: Estimate
    seeds: Sequence[float] = ()
    filled: bool = True


def _forest_plot(
    name: str, title: str, x_label: str, rows: Sequence[_Row], caption: str, zero_line: bool = False
) -> Plot:
    drawn = rows[:MAX_ROWS]
    figure = make_figure(8.0, 1.1 + 0.26 * len(drawn))
    axes = figure.subplots()
    add_light_grid(axes, "x")
    if zero_line:
        axes.axvline(0, color="black", linewidth=1)
    for y, row in enumerate(drawn):
        if row.mean.low is not None and row.mean.high is not None:
            axes.plot([row.mean.low, row.mean.high], [y, y], color=COLOURS[0], linewidth=2)
        fill = COLOURS[0] if row.filled else "white"
        axes.plot(row.mean.mean, y, "o", color=COLOURS[0], markerfacecolor=fill, markersize=6.5, markeredgewidth=1.6)
        axes.plot(row.seeds, [y + 0.26] * len(row.seeds), ".", color=GREY, markersize=4)
    axes.set_yticks(range(len(drawn)), [shorten(row.label) for row in drawn], fontsize=9)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.set_xlabel(x_label, fontsize=10)
    axes.tick_params(axis="y", length=0)
    alt = _describe(title, [f"{row.label}: {format_mean(row.mean)}" for row in rows])
    if len(rows) > len(drawn):
        caption += f" The first {len(drawn)} of {len(rows)} are shown."
    return Plot(file_name(name), title, figure, alt, caption)


def costs(subject: Subject) -> Drawn:
    """Plot the first metric over time and over memory."""
    study, metric = subject.study, subject.metrics[0]
    title = f"{metric} against time and memory"
    points = [(group, mean, *cost(group)) for group in study.groups if (mean := group.estimate(metric))]
    panels = {
        "seconds": [(group, mean, seconds.mean) for group, mean, seconds, _ in points if seconds],
        "peak memory (GiB)": [(group, mean, peak) for group, mean, _, peak in points if peak is not None],
    }
    panels = {name: panel for name, panel in panels.items() if panel}
    if not panels:
        yield NoPlot(title, "no finished run has recorded its time or its memory")
        return
    labels = {id(group): study.label(group, *numeric_axes(study)) for group in study.groups}
    styles = dict(zip(dict.fromkeys(labels.values()), STYLES, strict=False))
    figure = make_figure(8.6, 3.4 + legend_height(list(styles)))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Artist] = {}
    for axes, (name, panel) in zip(grid, panels.items(), strict=True):
        add_light_grid(axes)
        for group, mean, x in panel:
            if (label := labels[id(group)]) not in styles:
                continue
            colour, marker, _ = styles[label]
            if mean.low is not None and mean.high is not None:
                axes.plot([x, x], [mean.low, mean.high], color=colour, linewidth=1, alpha=0.6)
            (handles[label],) = axes.plot(x, mean.mean, marker, color=colour, markersize=6, linestyle="none")
        axes.set_xlabel(name, fontsize=10)
        axes.margins(x=0.08)
    grid[0].set_ylabel(metric, fontsize=10)
    add_legend(figure, handles)
    texts = [
        f"{study.label(group)}: {mean.mean:.3f}"
        + (f", {seconds.mean:.1f} s" if seconds else "")
        + (f", {peak:.2f} GiB" if peak is not None else "")
        for group, mean, seconds, peak in points
    ]
    caption = (
        "One point for each group: mean over seeds, with its 95 % interval. The table of time and memory "
        "explains how both are measured."
    )
    if (drawn := sum(labels[id(group)] in styles for group, *_ in points)) < len(points):
        caption += f" The first {drawn} of {len(points)} are shown."
    yield Plot(file_name(f"{metric}_cost"), title, figure, _describe(title, texts), caption)


def _describe(title: str, texts: Sequence[str]) -> str:
    more = "; the table has more" if len(texts) > MAX_DESCRIBED else ""
    return f"{title}. {'; '.join(texts[:MAX_DESCRIBED])}{more}."
