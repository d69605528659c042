"""All that a report draws. Each maker gives plots, or says why there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable

from lpc_lightning.evaluation.figures import NoPlot, Plot
from lpc_lightning.evaluation.report.adaptation_plots import annotator_adaptation
from lpc_lightning.evaluation.report.group_plots import costs, differences, means
from lpc_lightning.evaluation.report.line_plots import against_axes, codebook_use, training_curves
from lpc_lightning.evaluation.report.subject import Drawn, Subject

MAKERS: tuple[Callable[[Subject], Drawn], ...] = (
    differences,
    against_axes,
    means,
    training_curves,
    codebook_use,
    annotator_adaptation,
    costs,
)
"""In the order in which a page shows them."""


def draw(subject: Subject) -> tuple[list[Plot], list[NoPlot]]:
    """All plots that have data, and the others."""
    found = [each for make in MAKERS for each in make(subject)]
    plots = [each for each in found if isinstance(each, Plot)]
    return plots, [each for each in found if isinstance(each, NoPlot)]
