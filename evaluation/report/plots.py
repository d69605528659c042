"""All plots of a report, in order. Each function yields plots, or the reason for a missing one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

from lpc_lightning.evaluation.figures import NoPlot, Plot
from lpc_lightning.evaluation.report.adaptation_plots import annotator_adaptation
from lpc_lightning.evaluation.report.group_plots import costs, differences, means
from lpc_lightning.evaluation.report.line_plots import against_axes, codebook_use, training_curves
from lpc_lightning.evaluation.report.subject import Drawn, Subject

PLOT_FUNCTIONS: tuple[Callable[[Subject], Drawn], ...] = (
    differences,
    against_axes,
    means,
    training_curves,
    codebook_use,
    annotator_adaptation,
    costs,
)
"""In the order of the page."""


def draw(subject: Subject) -> tuple[list[Plot], list[NoPlot]]:
    """Draw all plots that have data, and list the others."""
    results = [result for plot in PLOT_FUNCTIONS for result in plot(subject)]
    plots: dict[str, Plot] = {}
    for result in results:
        if isinstance(result, Plot):
            # Names of files have fewer letters than those of metrics.
            names = (result.name if number == 1 else f"{result.name}-{number}" for number in count(1))
            name = next(name for name in names if name not in plots)
            plots[name] = replace(result, name=name)
    return list(plots.values()), [result for result in results if isinstance(result, NoPlot)]
