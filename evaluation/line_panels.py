"""Panels of lines with confidence bands, and their description in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lpc_lightning.evaluation.figures import STYLES, add_legend, legend_height, make_figure, shorten
from lpc_lightning.evaluation.statistics.seeds import Estimate

PANELS_PER_ROW = 3
BAND_MARGIN = 1.0
"""How far bands are drawn above the highest and below the lowest line, as a share of the distance between the two."""
MAX_DESCRIBED = 12
"""Most lines or groups that the description of a plot contains."""


@dataclass(frozen=True)
class Line:
    """A line in a panel: estimates over a number, or one level."""

    label: str
    positions: Sequence[float]
    """Horizontal positions in rising order."""
    means: Sequence[Estimate]
    """One estimate for each position."""
    level: Estimate | None = None
    """A value that holds at every position. If given, it is drawn as a horizontal line in place of `means`."""


def draw_panels(
    panels: Mapping[str, Sequence[Line]], markers: bool, x_label: str, y_label: str, level: float | None = None
) -> tuple[Figure, list[Axes]]:
    """Draw panels side by side with one scale and one legend. A label has the same style in all panels.

    Args:
        panels: Lines by the panel's title.
        markers: If true, mark each position that has a value.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        level: A value that must be visible, in addition to the lines.

    Returns:
        The figure and its visible panels. Lines beyond the number of `STYLES` are left out.
    """
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    styles = dict(zip(labels, STYLES, strict=False))
    columns = min(len(panels), PANELS_PER_ROW)
    rows = -(-len(panels) // columns)
    height = 3.4 * rows if len(panels) == 1 else 2.7 * rows
    figure = make_figure(7.0 if columns == 1 else 8.6, height + 0.4 + legend_height(list(styles)))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    handles: dict[str, Artist] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        axes.set_title(shorten(title), fontsize=10)
        for line in lines:
            if line.label in styles:
                handles[line.label] = _draw_line(axes, line, styles[line.label], markers)
    drawn = [line for lines in panels.values() for line in lines if line.label in styles]
    means = [mean.mean for line in drawn for mean in (line.means if line.level is None else [line.level])]
    _crop_bands(grid[0], means if level is None else [*means, level])
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[: len(panels) : columns]:
        axes.set_ylabel(y_label, fontsize=10)
    # The lowest panel of each column, also where the last row has no panel.
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel(x_label, fontsize=10)
        axes.tick_params(labelbottom=True)
    add_legend(figure, handles)
    return figure, grid[: len(panels)]


def _crop_bands(axes: Axes, means: Sequence[float]) -> None:
    """Crop bands that are much wider than the distance between the lines, such as those of two seeds.

    Uncropped, they would make the lines look like a single one.
    """
    if not means or (distance := max(means) - min(means)) == 0:
        return
    axes.update_datalim([(axes.dataLim.x0, value) for value in (min(means), max(means))], updatex=False)
    axes.autoscale_view(scalex=False)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, min(means) - BAND_MARGIN * distance), min(top, max(means) + BAND_MARGIN * distance))


def _draw_line(axes: Axes, line: Line, style: tuple[str, str, str], markers: bool) -> Artist:
    colour, marker, line_style = style
    if line.level is not None:
        return axes.axhline(line.level.mean, color=colour, linestyle=line_style, linewidth=1.4)
    (artist,) = axes.plot(
        line.positions,
        [mean.mean for mean in line.means],
        color=colour,
        linestyle=line_style,
        linewidth=1.6,
        marker=marker if markers or len(line.positions) == 1 else "",
        markersize=5,
    )
    low = [np.nan if mean.low is None else mean.low for mean in line.means]
    high = [np.nan if mean.high is None else mean.high for mean in line.means]
    if not np.isnan(low).all():
        axes.fill_between(line.positions, low, high, color=colour, alpha=0.15, linewidth=0)
    return artist


def describe_lines(title: str, panels: Mapping[str, Sequence[Line]], to_value: Callable[[float], float] = float) -> str:
    """Describe a plot of lines by the value at both ends of each line.

    Args:
        title: The plot's title.
        panels: Lines by the panel's title.
        to_value: Turns a horizontal position into the number that it stands for.
    """
    texts = []
    for panel, lines in panels.items():
        for line in lines:
            name = f"{panel}, {line.label}" if panel else line.label
            if line.level is not None:
                texts.append(f"{name}: {format_mean(line.level)} throughout")
            else:
                first, last = to_value(line.positions[0]), to_value(line.positions[-1])
                ends = f"{format_mean(line.means[0])} at {first:g}, {format_mean(line.means[-1])} at {last:g}"
                texts.append(f"{name}: {ends}")
    more = "; the tables have more" if len(texts) > MAX_DESCRIBED else ""
    return f"{title}. {'; '.join(texts[:MAX_DESCRIBED])}{more}."


def describe_cut(panels: Mapping[str, Sequence[Line]]) -> str:
    """Return a sentence on how many lines are shown, or nothing if all are shown."""
    labels = {line.label for lines in panels.values() for line in lines}
    return f" The first {len(STYLES)} of {len(labels)} lines are shown." if len(labels) > len(STYLES) else ""


def format_mean(mean: Estimate) -> str:
    """Format a mean for the description of a plot."""
    return f"{mean.mean:.3f}"
