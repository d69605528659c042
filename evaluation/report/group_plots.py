"""Plots with a mark for each group: means, differences to a baseline, and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist

from lpc_lightning.evaluation.comparison.comparison import LEVEL
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
from lpc_lightning.evaluation.report.subject import Drawn, Subject, file_name, numeric_axes
from lpc_lightning.evaluation.report.tables import cost
from lpc_lightning.evaluation.statistics.seeds import Estimate

MOST_ROWS = 80
"""Groups in one figure of means."""


def means(subject: Subject) -> Drawn:
    """Every group's mean with its interval, and its seeds."""
    for metric in subject.metrics:
        title = f"{metric} of each group"
        found = [(group, mean) for group in subject.study.groups if (mean := group.estimate(metric))]
        if not found:
            yield NoPlot(title, f"no finished run has logged {metric}")
            continue
        rows = [
            _Row(subject.study.label(group), mean, [value for _, value in group.values(metric)])
            for group, mean in found
        ]
        caption = "Point and bar: mean over seeds and Student's 95 % interval. Small dots: single seeds."
        yield _forest(f"{metric}_means", title, metric, rows, caption)


def differences(subject: Subject) -> Drawn:
    """Every group's difference to its baseline with its interval."""
    if not subject.contrasts:
        yield NoPlot("Differences to a baseline", "no baseline was chosen (--baseline AXIS=VALUE), or no run has one")
    for metric in subject.metrics if subject.contrasts else ():
        title = f"{metric}: difference to {subject.baseline}"
        rows = [
            _Row(
                subject.study.label(each.group),
                each.difference.estimate,
                stands_out=each.p_corrected is not None and each.p_corrected < LEVEL,
            )
            for each in subject.contrasts
            if each.metric == metric and each.difference
        ]
        if not rows:
            yield NoPlot(title, "no seed is in a group and in its baseline")
            continue
        caption = (
            "Mean difference under the same seeds, with Student's 95 % interval. Filled: significant at 0.05 after "
            "Holm's correction. Without a bar: one pair."
        )
        yield _forest(f"{metric}_differences", title, f"difference in {metric}", rows, caption, zero=True)


@dataclass(frozen=True)
class _Row:
    label: str
    mean: Estimate
    seeds: Sequence[float] = ()
    stands_out: bool = True


def _forest(name: str, title: str, metric: str, rows: Sequence[_Row], caption: str, zero: bool = False) -> Plot:
    shown = rows[:MOST_ROWS]
    figure = make_figure(8.0, 1.1 + 0.26 * len(shown))
    axes = figure.subplots()
    add_light_grid(axes, "x")
    if zero:
        axes.axvline(0, color="black", linewidth=1)
    for place, row in enumerate(shown):
        if row.mean.low is not None and row.mean.high is not None:
            axes.plot([row.mean.low, row.mean.high], [place, place], color=COLOURS[0], linewidth=2)
        fill = COLOURS[0] if row.stands_out else "white"
        axes.plot(
            row.mean.mean, place, "o", color=COLOURS[0], markerfacecolor=fill, markersize=6.5, markeredgewidth=1.6
        )
        axes.plot(row.seeds, [place + 0.26] * len(row.seeds), ".", color=GREY, markersize=4)
    axes.set_yticks(range(len(shown)), [shorten(row.label) for row in shown], fontsize=9)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel(metric, fontsize=10)
    axes.tick_params(axis="y", length=0)
    told = "; ".join(f"{row.label}: {format_mean(row.mean)}" for row in rows[:MAX_DESCRIBED])
    alt = f"{title}. {told}{'; and more, which the table has' if len(rows) > MAX_DESCRIBED else ''}."
    if len(rows) > len(shown):
        caption += f" The first {len(shown)} of {len(rows)} are shown."
    return Plot(file_name(name), title, figure, alt, caption)


def costs(subject: Subject) -> Drawn:
    """Accuracy against time and memory."""
    study, metric = subject.study, subject.metrics[0]
    title = f"{metric} against time and memory"
    points = [(group, mean, *cost(group)) for group in study.groups if (mean := group.estimate(metric))]
    panels = {
        "seconds": [(group, mean, seconds.mean) for group, mean, seconds, _ in points if seconds],
        "peak memory (GiB)": [(group, mean, peak) for group, mean, _, peak in points if peak is not None],
    }
    panels = {name: found for name, found in panels.items() if found}
    if not panels:
        yield NoPlot(title, "no finished run tells its time or its memory")
        return
    named = {id(group): study.label(group, *numeric_axes(study)) for group in study.groups}
    looks = dict(zip(dict.fromkeys(named.values()), STYLES, strict=False))
    figure = make_figure(8.6, 3.4 + legend_height(list(looks)))
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    handles: dict[str, Artist] = {}
    for axes, (name, found) in zip(grid, panels.items(), strict=True):
        add_light_grid(axes)
        for group, mean, place in found:
            if (label := named[id(group)]) not in looks:
                continue
            colour, marker, _ = looks[label]
            if mean.low is not None and mean.high is not None:
                axes.plot([place, place], [mean.low, mean.high], color=colour, linewidth=1, alpha=0.6)
            (handles[label],) = axes.plot(place, mean.mean, marker, color=colour, markersize=6, linestyle="none")
        axes.set_xlabel(name, fontsize=10)
        axes.margins(x=0.08)
    grid[0].set_ylabel(metric, fontsize=10)
    add_legend(figure, handles)
    told = "; ".join(
        f"{study.label(group)}: {mean.mean:.3f}"
        + (f", {seconds.mean:.1f} s" if seconds else "")
        + (f", {peak:.2f} GiB" if peak is not None else "")
        for group, mean, seconds, peak in points[:MAX_DESCRIBED]
    )
    caption = (
        "A point a group: mean over seeds, with Student's 95 % interval. The table of time and memory tells how both "
        "are measured."
    )
    alt = f"{title}. {told}{'; and more, which the table has' if len(points) > MAX_DESCRIBED else ''}."
    yield Plot(file_name(f"{metric}_cost"), title, figure, alt, caption)
