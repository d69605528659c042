"""The data of a report's plots, and helpers that several plots share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lpc_lightning.evaluation.figures import NoPlot, Plot
from lpc_lightning.evaluation.report.contrasts import Contrast
from lpc_lightning.evaluation.report.study import Study, is_numeric

Drawn = Iterator[Plot | NoPlot]


@dataclass(frozen=True)
class Subject:
    """Everything that a report can draw."""

    study: Study
    metrics: Sequence[str]
    contrasts: Sequence[Contrast]
    baseline: str
    """Name of the baseline. Empty: there is no baseline."""
    numeric_axes: Sequence[str]
    """Numeric axes to plot metrics against."""


def numeric_axes(study: Study) -> list[str]:
    """Return the axes that have at least two values, all of them numbers."""
    return [axis for axis, values in study.axes.items() if len(values) > 1 and is_numeric(values)]


def file_name(text: str) -> str:
    """Turn a title into a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")
