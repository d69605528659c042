"""Plots of accuracy over the number of labelled pairs, on an axis that starts at 0 and then doubles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from scipy import stats

from lpc_lightning.clustered_means import ClusterScores, degrees_of_freedom
from lpc_lightning.evaluation.adaptation.scores import Score
from lpc_lightning.evaluation.figures import GREY, add_light_grid
from lpc_lightning.evaluation.line_panels import Line, draw_panels
from lpc_lightning.evaluation.statistics.seeds import CONFIDENCE, MIN_PROMPTS, Estimate, Shared
from lpc_lightning.evaluation.statistics.shared_clusters import with_annotators

TITLE = "Accuracy on an annotator's pairs, given others of the same annotator"


def to_position(shots: float) -> float:
    """Return the horizontal position of a number of labelled pairs: 0 at 0, 1 at 1, and 1 more for each doubling."""
    return 0.0 if shots == 0 else 1.0 + math.log2(shots)


def to_shots(position: float) -> float:
    """Return the number of labelled pairs at a horizontal position: the inverse of `to_position`."""
    return 0.0 if position == 0 else 2.0 ** (position - 1)


def draw_adaptation(
    panels: Mapping[str, Sequence[Line]], shots: Sequence[int], ceiling: float | None, metric: str
) -> Figure:
    """Draw lines over the number of labelled pairs.

    Args:
        panels: Lines by the panel's title, positioned by `to_position`.
        shots: Numbers of labelled pairs that get a tick.
        ceiling: The best accuracy that is possible given the annotator. None: not known, not drawn.
        metric: Label of the vertical axis.
    """
    figure, grid = draw_panels(panels, True, "labelled pairs of the annotator", metric, ceiling)
    for axes in grid:
        add_light_grid(axes)
        axes.set_xticks([to_position(n) for n in shots], [str(n) for n in shots])
        if ceiling is not None:
            axes.axhline(ceiling, color=GREY, linewidth=1.2, linestyle=(0, (1, 2)), zorder=1)
            axes.annotate(
                "best given the annotator",
                (0.01, ceiling),
                xycoords=("axes fraction", "data"),
                xytext=(0, -3),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=GREY,
            )
    return figure


def score_line(label: str, scores: Mapping[int, Score]) -> Line:
    """Return one policy's scores by number of labelled pairs as a line, with intervals from their standard errors."""
    return Line(label, [to_position(n) for n in scores], [score_estimate(score) for score in scores.values()])


def score_estimate(score: Score) -> Estimate:
    """Return a score with Student's 95 % interval over prompts and annotators.

    Fewer than `MIN_PROMPTS` prompts give none. With fewer annotators it is over prompts alone.
    """
    over = with_annotators(*map(_variance, (score.of_prompts, score.of_annotators, score.of_both)))
    if over.variance is None:
        return Estimate(score.pairs, score.accuracy, prompts=score.prompts)
    error, mean = over.variance**0.5, score.accuracy
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, over.freedom)) * error if error else 0.0
    return Estimate(
        score.pairs, mean, error * score.pairs**0.5, mean - half, mean + half, over.prompts, over.annotators
    )


def _variance(clusters: ClusterScores) -> Shared:
    """Return the variance of one mean over its clusters. It is unknown for fewer than `MIN_PROMPTS`."""
    count = len(clusters.deviations)
    if count < MIN_PROMPTS:
        return Shared(None, count)
    return Shared(clusters.variance, count, freedom=degrees_of_freedom(clusters.shares.values()))
