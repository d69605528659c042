"""What a report's plots are of, and what they have in common in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lpc_lightning.evaluation.figures import NoPlot, Plot
from lpc_lightning.evaluation.report.contrasts import Contrast
from lpc_lightning.evaluation.report.study import Study, is_numeric
from lpc_lightning.evaluation.statistics.seeds import Estimate

MOST_ALT = 12
"""Lines or groups that the words for those who cannot see a plot go through."""

Drawn = Iterator[Plot | NoPlot]


@dataclass(frozen=True)
class Subject:
    """What there is to draw."""

    study: Study
    metrics: Sequence[str]
    contrasts: Sequence[Contrast]
    baseline: str
    """Its name; empty where there is none."""
    along: Sequence[str]
    """Axes of numbers to draw metrics against."""


def numeric_axes(study: Study) -> list[str]:
    """Axes of two numbers or more."""
    return [axis for axis, values in study.axes.items() if len(values) > 1 and is_numeric(values)]


def file_name(text: str) -> str:
    """A title as the name of a file."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_")


def told_mean(mean: Estimate) -> str:
    """A mean in words for those who cannot see a plot."""
    return f"{mean.mean:.3f}"
