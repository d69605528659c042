"""Figures of the codebook: what it is used for, and how. No pyplot: nothing global is opened or left open."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lpc_lightning.evaluation.accuracy.accuracy_modes import OTHERS, largest
from lpc_lightning.evaluation.codebook.embedding import embed
from lpc_lightning.evaluation.codebook.mutual_information import entropy
from lpc_lightning.evaluation.figures import COLOURS, MARKERS

OTHERS_COLOUR = "#BBBBBB"
MOST_CODES, MOST_COLUMNS, MOST_COLOURS = 40, 20, 14
MOST_NUMBERED_CELLS = 260
LONGEST_NAME = 28


def heat_map(codes: NDArray[np.int64], labels: Sequence[str], kind: str, title: str) -> Figure:
    """Codes by labels: the share of each label among the pairs that a code leads for.

    Args:
        codes: (n,) the likeliest code of each pair.
        labels: (n,) its source, factor or the like; pairs without one ("") are left out.
        kind: What the labels are: `source`.
        title: Stands above.
    """
    pairs = [(int(code), label) for code, label in zip(codes, largest(labels, MOST_COLUMNS), strict=True) if label]
    leading = Counter(code for code, _ in pairs)
    rows = [code for code, _ in leading.most_common(MOST_CODES)]
    columns = sorted({label for _, label in pairs}, key=lambda label: (label == OTHERS, label))
    counts = np.zeros((len(rows) + 1, len(columns)), dtype=int)
    for code, label in pairs:
        counts[rows.index(code) if code in rows else -1, columns.index(label)] += 1
    # Codes that lead for the same label stand together.
    order = sorted(range(len(rows)), key=lambda row: (counts[row].argmax(), -counts[row].max()))
    names = [f"code {rows[row]}" for row in order]
    if rest := len(leading) - len(rows):
        order, names = [*order, len(rows)], [*names, f"{rest} others"]
    counts = np.vstack([counts[order], counts.sum(0)])
    names = [f"{name}  (n = {total})" for name, total in zip([*names, "all"], counts.sum(1), strict=True)]

    figure = _figure(_between(5.5, 3.2 + 0.5 * len(columns), 14), _between(4, 2.2 + 0.24 * len(names), 13))
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True)
    image = axes.imshow(shares, cmap="cividis", vmin=0, aspect="auto")
    figure.colorbar(image, ax=axes, label="share of the code's pairs")
    axes.axhline(len(names) - 1.5, color="white", linewidth=3)
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=50, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=kind, ylabel="likeliest code under the prior", title=title)
    if counts.size <= MOST_NUMBERED_CELLS:
        for (row, column), count in np.ndenumerate(counts):
            shade = "black" if shares[row, column] > shares.max() / 2 else "white"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=shade)
    return figure


def code_use(
    prior: NDArray[np.float64], codes: NDArray[np.int64], posterior: NDArray[np.float64] | None, title: str
) -> Figure:
    """Bars of how much each code is used, the most used first.

    Args:
        prior: (K,) the mean prior over all pairs.
        codes: (n,) the likeliest code of each pair.
        posterior: (K,) the mean posterior, where there is one.
        title: Stands above; perplexity and dead codes are added.
    """
    order = np.argsort(-prior, kind="stable")
    leads = np.bincount(codes, minlength=len(prior)) / len(codes)
    places = np.arange(len(prior))
    figure = _figure(_between(6, 2.5 + 0.18 * len(prior), 12), 5.5)
    mass, lead = figure.subplots(2, sharex=True)
    mass.bar(places, prior[order], color=COLOURS[0], width=0.8, label="mean prior")
    if posterior is not None:
        mass.plot(places, posterior[order], "_", color=COLOURS[6], markersize=7, label="mean posterior")
    mass.axhline(1 / len(prior), color=COLOURS[5], linewidth=1, linestyle="--", label="even use, 1 / K")
    mass.legend(frameon=False, fontsize=8)
    lead.bar(places, leads[order], color=COLOURS[1], width=0.8)
    step = -(-len(prior) // 40)
    lead.set_xticks(places[::step], [str(code) for code in order[::step]], fontsize=7, rotation=90 * (step > 1))
    perplexity, dead = np.exp(entropy(prior)), int((leads == 0).sum())
    mass.set(title=f"{title}\nperplexity {perplexity:.1f} of {len(prior)}", ylabel="probability", ylim=(0, None))
    lead.set(title=f"{dead} codes are likeliest for no pair", ylabel="share of pairs", ylim=(0, None))
    lead.set_xlabel("code, the highest mean prior first")
    return figure


def scatter(points: NDArray[np.float32], labels: Sequence[str], kind: str, title: str, seed: int) -> Figure:
    """z of some pairs on a plane, coloured by label.

    Args:
        points: (n, d) z.
        labels: (n,) what colours them; "" is drawn in grey.
        kind: What the labels are: `source`.
        title: Stands above, behind the method's name.
        seed: Of the layout.
    """
    embedding = embed(points, seed)
    figure = _figure(8, 5)
    axes = figure.subplots()
    if embedding.places is None:
        axes.set_title(title)
        axes.text(0.5, 0.5, embedding.method, ha="center", va="center", wrap=True)
        axes.set_axis_off()
        return figure
    _draw_groups(axes, embedding.places, largest(labels, MOST_COLOURS))
    axes.set_title(f"{embedding.method} of {title}")
    axes.set(xticks=[], yticks=[], xlabel=f"{embedding.method} 1 (no unit)", ylabel=f"{embedding.method} 2 (no unit)")
    axes.legend(title=kind, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def _draw_groups(axes: Axes, places: NDArray[np.float64], labels: list[str]) -> None:
    styles = [(colour, marker) for marker in MARKERS for colour in COLOURS]
    named = sorted(set(labels) - {"", OTHERS})
    looks = dict(zip(named, styles, strict=False)) | {OTHERS: (OTHERS_COLOUR, "."), "": (OTHERS_COLOUR, "x")}
    for label in [*named, *({"", OTHERS} & set(labels))]:
        members = np.array([each == label for each in labels])
        colour, marker = looks[label]
        text = f"{_short(label) or '(none)'} ({members.sum()})"
        axes.scatter(
            places[members, 0],
            places[members, 1],
            c=colour,
            marker=marker,
            s=16,
            alpha=0.75,
            linewidths=0.5,
            label=text,
        )


def render(figure: Figure, path: Path) -> NDArray[np.uint8]:
    """Write a figure as PNG, and give its pixels (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        # Names of sources may be in any script; a missing glyph becomes a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        canvas.draw()
        canvas.print_png(path)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _short(name: str) -> str:
    # A dollar sign would open a formula.
    name = name.replace("$", r"\$")
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _between(least: float, value: float, most: float) -> float:
    return max(least, min(value, most))
