"""The look that all plots of a report share, and their files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lpc_lightning.evaluation.codebook.plots import COLOURS, MARKERS
from lpc_lightning.evaluation.statistics.seeds import Estimate

LINES = ("-", "--", ":", "-.")
LOOKS = [(COLOURS[place % 7], MARKERS[place % 4], LINES[place // 7]) for place in range(28)]
"""Of a line: neighbours differ in colour and marker, so that they can be told apart in grey as well."""
MOST_LINES = 7
"""Lines in one panel before they are spread over several."""
LONGEST_NAME = 64
BEYOND = 1.0
"""How far bands are shown above and below all lines, as a share of how far these are apart."""
PANELS_IN_ROW = 3
DPI = 160
"""Of PNG files."""
QUIET = "#8A8A8A"
"""Of what stands behind."""


@dataclass(frozen=True)
class Plot:
    """A figure, and what it says in words."""

    name: str
    """Of its files."""
    title: str
    figure: Figure
    alt: str
    """For those who cannot see it."""
    caption: str
    """How to read it."""


@dataclass(frozen=True)
class NoPlot:
    """A plot that has no data."""

    title: str
    why: str


@dataclass(frozen=True)
class Line:
    """A line in a panel: means over something numeric."""

    label: str
    places: Sequence[float]
    """Rising."""
    means: Sequence[Estimate]
    level: Estimate | None = None
    """In place of a line: a value that holds everywhere."""


def draw_panels(
    panels: Mapping[str, Sequence[Line]], markers: bool, along: str, metric: str, level: float | None = None
) -> tuple[Figure, list[Axes]]:
    """Panels side by side with one scale and one legend; each label looks the same in all of them.

    Args:
        panels: Lines by the panel's title.
        markers: Whether to mark the places where there are values.
        along: What is on the horizontal axis.
        metric: What is on the vertical one.
        level: A value that stays in view beside the lines.
    """
    labels = list(dict.fromkeys(line.label for lines in panels.values() for line in lines))
    looks = dict(zip(labels, LOOKS, strict=False))
    across = min(len(panels), PANELS_IN_ROW)
    down = -(-len(panels) // across)
    height = 3.4 * down if len(panels) == 1 else 2.7 * down
    figure = make_figure(7.0 if across == 1 else 8.6, height + 0.4 + legend_height(list(looks)))
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    handles: dict[str, Artist] = {}
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        axes.set_title(short(title), fontsize=10)
        for line in lines:
            if line.label in looks:
                handles[line.label] = _draw(axes, line, looks[line.label], markers)
    shown = [line for lines in panels.values() for line in lines if line.label in looks]
    means = [each.mean for line in shown for each in (line.means if line.level is None else [line.level])]
    _keep_lines_apart(grid[0], means if level is None else [*means, level])
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[: len(panels) : across]:
        axes.set_ylabel(metric, fontsize=10)
    # The lowest panels, those above an empty place among them.
    for axes in grid[max(0, len(panels) - across) : len(panels)]:
        axes.set_xlabel(along, fontsize=10)
        axes.tick_params(labelbottom=True)
    add_legend(figure, handles)
    return figure, grid[: len(panels)]


def _keep_lines_apart(axes: Axes, means: Sequence[float]) -> None:
    """Cut bands that are far wider than the lines are apart, as those of two seeds: the lines would be all but one."""
    if not means or (across := max(means) - min(means)) == 0:
        return
    axes.update_datalim([(axes.dataLim.x0, value) for value in (min(means), max(means))], updatex=False)
    axes.autoscale_view(scalex=False)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, min(means) - BEYOND * across), min(top, max(means) + BEYOND * across))


def _draw(axes: Axes, line: Line, look: tuple[str, str, str], markers: bool) -> Artist:
    colour, marker, style = look
    if line.level is not None:
        return axes.axhline(line.level.mean, color=colour, linestyle=style, linewidth=1.4)
    (drawn,) = axes.plot(
        line.places,
        [each.mean for each in line.means],
        color=colour,
        linestyle=style,
        linewidth=1.6,
        marker=marker if markers or len(line.places) == 1 else "",
        markersize=5,
    )
    low = [np.nan if each.low is None else each.low for each in line.means]
    high = [np.nan if each.high is None else each.high for each in line.means]
    if not np.isnan(low).all():
        axes.fill_between(line.places, low, high, color=colour, alpha=0.15, linewidth=0)
    return drawn


def add_legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """A legend below all panels, in as many columns as fit; none for a single line."""
    names = [short(label) for label in handles]
    if len(names) == 1:
        return
    columns = _legend_columns(names)
    figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def legend_height(labels: Sequence[str]) -> float:
    """Its height in inches."""
    return 0.2 + 0.2 * -(-len(labels) // _legend_columns([short(label) for label in labels]))


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(len(names), 100 // (8 + max(map(len, names), default=1))))


def make_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def short(name: str) -> str:
    """A name that fits, its middle left out where it is too long."""
    # A dollar sign would open a formula.
    name = name.replace("$", r"\$")
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def quiet_grid(axes: Axes, along: str = "both") -> None:
    """Thin lines behind the data, and no box around it."""
    axes.grid(axis=along, color="#D9D9D9", linewidth=0.6)  # type: ignore[arg-type]  # one of three words
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def to_svg(figure: Figure) -> bytes:
    """A figure as SVG: the same bytes for the same figure, its letters as outlines, so that no font is needed."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lpc", "svg.fonttype": "path"}), _any_script():
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    return buffer.getvalue()


def write_plots(folder: Path, plots: Sequence[Plot]) -> Iterator[tuple[Plot, bytes]]:
    """Write NAME.svg and NAME.png of each plot into a folder that is there; gives each plot with its SVG."""
    for plot in plots:
        svg = to_svg(plot.figure)
        (folder / f"{plot.name}.svg").write_bytes(svg)
        with _any_script():
            plot.figure.savefig(folder / f"{plot.name}.png", dpi=DPI)
        yield plot, svg


@contextmanager
def _any_script() -> Iterator[None]:
    """Names may be in any script; a missing glyph becomes a box."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield
