"""Figures of the codebook: how often codes are used, and for which labels. pyplot and its global state are not used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lpc_lightning.evaluation.accuracy.accuracy_modes import OTHERS, keep_largest
from lpc_lightning.evaluation.codebook.embedding import embed
from lpc_lightning.evaluation.codebook.mutual_information import entropy
from lpc_lightning.evaluation.figures import COLOURS, MARKERS, literal_text, shorten
from lpc_lightning.files.json_files import replaced_file

OTHERS_COLOUR = "#BBBBBB"
MAX_CODES, MAX_COLUMNS, MAX_COLOURS = 40, 20, 14
"""Maximum numbers of codes and labels in a heat map, and of labels in a scatter plot. Smaller groups are merged."""
MAX_NUMBERED_CELLS = 260
"""Maximum number of cells of a heat map with printed counts. In larger maps the counts would be illegible."""
MAX_NAME_LENGTH = 28
"""Maximum number of characters of a label. Longer labels are shortened in the middle."""


def heat_map(codes: NDArray[np.int64], labels: Sequence[str], kind: str, title: str) -> Figure:
    """Draw codes by labels: the share of each label among the pairs with this likeliest code.

    Args:
        codes: (n,) likeliest code of each pair.
        labels: (n,) label of each pair, such as its source or factor. Pairs with an empty label are left out.
        kind: Kind of label, such as `source`.
        title: Title of the figure.
    """
    kept_labels = keep_largest(labels, MAX_COLUMNS)
    pairs = [(int(code), label) for code, label in zip(codes, kept_labels, strict=True) if label]
    pair_counts = Counter(code for code, _ in pairs)
    rows = [code for code, _ in pair_counts.most_common(MAX_CODES)]
    columns = sorted({label for _, label in pairs}, key=lambda label: (label == OTHERS, label))
    counts = np.zeros((len(rows) + 1, len(columns)), dtype=int)
    for code, label in pairs:
        counts[rows.index(code) if code in rows else -1, columns.index(label)] += 1
    # Codes with the same most frequent label are neighbours.
    order = sorted(range(len(rows)), key=lambda row: (counts[row].argmax(), -counts[row].max()))
    names = [f"code {rows[row]}" for row in order]
    if rest := len(pair_counts) - len(rows):
        order, names = [*order, len(rows)], [*names, f"{rest} others"]
    counts = np.vstack([counts[order], counts.sum(0)])
    names = [f"{name}  (n = {total})" for name, total in zip([*names, "all"], counts.sum(1), strict=True)]

    figure = _figure(_clamp(5.5, 3.2 + 0.5 * len(columns), 14), _clamp(4, 2.2 + 0.24 * len(names), 13))
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdims=True)
    image = axes.imshow(shares, cmap="cividis", vmin=0, aspect="auto")
    figure.colorbar(image, ax=axes, label="share of the code's pairs")
    axes.axhline(len(names) - 1.5, color="white", linewidth=3)
    axes.set_xticks(range(len(columns)), [shorten(name, MAX_NAME_LENGTH) for name in columns], rotation=50, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=kind, ylabel="likeliest code under the prior", title=title)
    if counts.size <= MAX_NUMBERED_CELLS:
        for (row, column), count in np.ndenumerate(counts):
            shade = "black" if shares[row, column] > shares.max() / 2 else "white"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=shade)
    return figure


def code_use(
    prior: NDArray[np.float64], codes: NDArray[np.int64], posterior: NDArray[np.float64] | None, title: str
) -> Figure:
    """Draw bars of how often each code is used, most used first.

    Args:
        prior: (K,) mean prior over all pairs.
        codes: (n,) likeliest code of each pair.
        posterior: (K,) mean posterior, or None.
        title: Title of the figure. Perplexity and the number of dead codes are added.
    """
    order = np.argsort(-prior, kind="stable")
    shares = np.bincount(codes, minlength=len(prior)) / len(codes)
    positions = np.arange(len(prior))
    figure = _figure(_clamp(7.5, 4 + 0.18 * len(prior), 13.5), 5.5)
    mass_axes, share_axes = figure.subplots(2, sharex=True)
    mass_axes.bar(positions, prior[order], color=COLOURS[0], width=0.8, label="mean prior")
    if posterior is not None:
        mass_axes.plot(positions, posterior[order], "_", color=COLOURS[6], markersize=7, label="mean posterior")
    mass_axes.axhline(1 / len(prior), color=COLOURS[5], linewidth=1, linestyle="--", label="even use, 1 / K")
    mass_axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    share_axes.bar(positions, shares[order], color=COLOURS[1], width=0.8)
    step = -(-len(prior) // 40)
    share_axes.set_xticks(
        positions[::step], [str(code) for code in order[::step]], fontsize=7, rotation=90 * (step > 1)
    )
    perplexity, dead = np.exp(entropy(prior)), int((shares == 0).sum())
    mass_axes.set(title=f"{title}\nperplexity {perplexity:.1f} of {len(prior)}", ylabel="probability", ylim=(0, None))
    dead_codes = "1 code is" if dead == 1 else f"{dead} codes are"
    share_axes.set(title=f"{dead_codes} likeliest for no pair", ylabel="share of pairs", ylim=(0, None))
    share_axes.set_xlabel("code, the highest mean prior first")
    return figure


def scatter(points: NDArray[np.float32], labels: Sequence[str], kind: str, title: str, seed: int) -> Figure:
    """Draw z of some pairs in a plane, coloured by label.

    Args:
        points: (n, d) z of each pair.
        labels: (n,) label of each pair. Points with an empty label are grey.
        kind: Kind of label, such as `source`.
        title: Title of the figure. The method's name is put before it.
        seed: Seed of the layout.
    """
    embedding = embed(points, seed)
    figure = _figure(8, 5)
    axes = figure.subplots()
    if embedding.coordinates is None:
        axes.set_title(title)
        axes.text(0.5, 0.5, embedding.method, ha="center", va="center", wrap=True)
        axes.set_axis_off()
        return figure
    _draw_groups(axes, embedding.coordinates, keep_largest(labels, MAX_COLOURS))
    axes.set_title(f"{embedding.method} of {title}")
    axes.set(xticks=[], yticks=[], xlabel=f"{embedding.method} 1 (no unit)", ylabel=f"{embedding.method} 2 (no unit)")
    axes.legend(title=kind, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return figure


def _draw_groups(axes: Axes, coordinates: NDArray[np.float64], labels: list[str]) -> None:
    styles = [(colour, marker) for marker in MARKERS for colour in COLOURS]
    named = sorted(set(labels) - {"", OTHERS})
    looks = dict(zip(named, styles, strict=False)) | {OTHERS: (OTHERS_COLOUR, "."), "": (OTHERS_COLOUR, "x")}
    for group in [*named, *({"", OTHERS} & set(labels))]:
        members = np.array([label == group for label in labels])
        colour, marker = looks[group]
        axes.scatter(
            coordinates[members, 0],
            coordinates[members, 1],
            c=colour,
            marker=marker,
            s=16,
            alpha=0.75,
            linewidths=0.5,
            label=f"{shorten(group, MAX_NAME_LENGTH) or '(none)'} ({members.sum()})",
        )


def render(figure: Figure, path: Path) -> NDArray[np.uint8]:
    """Write a figure as a PNG file, and return its pixels (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    with replaced_file(path) as file, literal_text(figure):
        canvas.print_png(file)  # draws the figure
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _clamp(low: float, value: float, high: float) -> float:
    return max(low, min(value, high))
