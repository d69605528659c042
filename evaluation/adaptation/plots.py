"""Accuracy against the labelled pairs that are given, on an axis that doubles and yet begins at 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from lpc_lightning.evaluation.adaptation.scores import Score
from lpc_lightning.evaluation.figures import QUIET, Line, draw_panels, quiet_grid
from lpc_lightning.evaluation.statistics.seeds import Estimate

NORMAL_95 = 1.96
"""Standard errors from the mean to an end of its 95 % interval, of many pairs."""


def place_of(shots: float) -> float:
    """0 at 0, 1 at 1, and one more with each doubling."""
    return 0.0 if shots == 0 else 1.0 + math.log2(shots)


def shots_at(place: float) -> float:
    """The other way round."""
    return 0.0 if place == 0 else 2.0 ** (place - 1)


def draw_adaptation(
    panels: Mapping[str, Sequence[Line]], shots: Sequence[int], ceiling: float | None, metric: str
) -> Figure:
    """Lines over labelled pairs.

    Args:
        panels: Lines by the panel's title, at `place_of` their shots; levels for policies that have nothing to adapt.
        shots: Which have a tick.
        ceiling: The best that can be had given the annotator, where it is known.
        metric: What is on the vertical axis.
    """
    figure, grid = draw_panels(panels, True, "labelled pairs of the annotator", metric, ceiling)
    for axes in grid:
        quiet_grid(axes)
        axes.set_xticks([place_of(n) for n in shots], [str(n) for n in shots])
        if ceiling is not None:
            axes.axhline(ceiling, color=QUIET, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
            axes.annotate(
                "best given the annotator",
                (0.01, ceiling),
                xycoords=("axes fraction", "data"),
                xytext=(0, -3),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=QUIET,
            )
    return figure


def score_line(label: str, scores: Mapping[int, Score]) -> Line:
    """Scores of one policy by labelled pairs, with the interval that their standard errors make."""
    return Line(label, [place_of(n) for n in scores], [score_estimate(each) for each in scores.values()])


def score_estimate(score: Score) -> Estimate:
    """A score with its normal 95 % interval over pairs."""
    if score.standard_error is None:
        return Estimate(score.pairs, score.accuracy)
    half = NORMAL_95 * score.standard_error
    deviation = score.standard_error * score.pairs**0.5
    return Estimate(score.pairs, score.accuracy, deviation, score.accuracy - half, score.accuracy + half)
