"""The common look of all plots, and the files that they are written to."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lpc_lightning.files.json_files import replaced_file

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
"""Palette of Okabe and Ito (2008), which colour-blind readers can distinguish. Its yellow is left out, because it is
hard to see on white."""
MARKERS = ("o", "^", "s", "D")
LINE_STYLES = ("-", "--", ":", "-.")
STYLES = [(COLOURS[index % 7], MARKERS[index % 4], LINE_STYLES[index // 7]) for index in range(28)]
"""Colour, marker and line style of each line. Neighbours differ in colour and in marker, so that they can be
distinguished in grey, too."""
GREY = "#8A8A8A"
"""Colour of what is drawn in the background."""
MAX_NAME_LENGTH = 64
"""Longest name in a plot, in characters."""
DPI = 160
"""Resolution of PNG files."""


@dataclass(frozen=True)
class Plot:
    """A figure with its texts."""

    name: str
    """Name of its files, without suffix."""
    title: str
    figure: Figure
    alt: str
    """Description for readers who cannot see the figure."""
    caption: str
    """Explanation of what is drawn."""


@dataclass(frozen=True)
class NoPlot:
    """A plot that was left out because its data is missing."""

    title: str
    reason: str


def add_legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """Add a legend below all panels, in as many columns as fit. A single line gets none.

    Args:
        figure: The figure, in constrained layout.
        handles: What is drawn, by label.
    """
    names = [shorten(label) for label in handles]
    if len(names) == 1:
        return
    columns = _legend_columns(names)
    figure.legend(list(handles.values()), names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def legend_height(labels: Sequence[str]) -> float:
    """Return the height of a legend in inches."""
    return 0.2 + 0.2 * -(-len(labels) // _legend_columns([shorten(label) for label in labels]))


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(len(names), 100 // (8 + max(map(len, names), default=1))))


def make_figure(width: float, height: float) -> Figure:
    """Make an empty figure of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def shorten(name: str, length: int = MAX_NAME_LENGTH) -> str:
    """Cut the middle out of a name of more than `length` characters."""
    half = length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[-half:]}"


def add_light_grid(axes: Axes, direction: str = "both") -> None:
    """Draw thin grid lines behind the data, and remove the top and right border.

    Args:
        axes: The panel.
        direction: Grid lines to draw: `x`, `y` or `both`.
    """
    axes.grid(axis=direction, color="#D9D9D9", linewidth=0.6)  # type: ignore[arg-type]  # one of three words
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def to_svg(figure: Figure) -> bytes:
    """Return a figure as SVG. The same figure always gives the same bytes.

    Letters are stored as outlines, so that the file needs no font.
    """
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lpc", "svg.fonttype": "path"}), literal_text(figure):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return buffer.getvalue()


def write_plots(folder: Path, plots: Sequence[Plot]) -> Iterator[tuple[Plot, bytes]]:
    """Write NAME.svg and NAME.png of each plot, and yield each plot with its SVG.

    Args:
        folder: An existing folder.
        plots: The plots to write.
    """
    for plot in plots:
        svg = to_svg(plot.figure)
        with replaced_file(folder / f"{plot.name}.svg") as file:
            file.write(svg)
        with replaced_file(folder / f"{plot.name}.png") as file, literal_text(plot.figure):
            plot.figure.savefig(file, dpi=DPI)
        yield plot, svg


@contextmanager
def literal_text(figure: Figure) -> Iterator[None]:
    """Draw all text of a figure character by character: names of runs and settings may have any.

    matplotlib reads text between dollar signs as a formula, and raises if it is none. For a letter that the font does
    not have it warns, and draws a box.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield
