"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lpc_lightning.evaluation.figures import NoPlot, Plot
from lpc_lightning.evaluation.report.runs.records import RunProvenance, RunRecord
from lpc_lightning.evaluation.report.study import LeftOut
from lpc_lightning.evaluation.report.table_files import Table

PIXELS = 96
"""Of a browser's inch."""


@dataclass(frozen=True)
class Picture:
    """A plot as a page holds it."""

    title: str
    source: str
    """A data URL with the SVG."""
    alt: str
    caption: str
    width: int
    """In pixels of a page, like the height."""
    height: int


@dataclass(frozen=True)
class RunDetails:
    """A run's own part of the page, by what stands before each value."""

    name: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """All that stands on a page."""

    title: str
    summary: str
    makings: Sequence[RunProvenance]
    axes: Mapping[str, str]
    settings: Mapping[str, Any]
    """In which all runs agree."""
    versions: Mapping[str, Any]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    not_drawn: Sequence[NoPlot]
    left_out: Table
    errors: Sequence[LeftOut]
    """Those with more to say than the line in the table."""
    runs: Table
    details: Sequence[RunDetails]


def picture(plot: Plot, svg: bytes) -> Picture:
    """A plot with its SVG, which an `img` keeps apart from the page and from other plots."""
    width, height = plot.figure.get_size_inches()
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return Picture(plot.title, source, plot.alt, plot.caption, round(width * PIXELS), round(height * PIXELS))


def run_details(record: RunRecord, common: Mapping[str, Any]) -> RunDetails:
    """A run's part of the page: what sets it apart, and its metrics but for those of single groups of pairs."""
    facts: dict[str, Any] = {**record.axes, "seed": record.seed, "status": record.status, "folder": record.place}
    facts |= {f"{part} parameters": f"{count:,}" for part, count in record.parameters.items()}
    return RunDetails(
        record.name,
        {name: "-" if value is None else value for name, value in facts.items()},
        {name: value for name, value in record.settings.items() if name not in common},
        {name: f"{value:.6g}" for name, value in record.metrics.items() if name.count("/") < 3},
    )


def to_html(page: Page) -> str:
    """The page as text. Whatever stands in `page` is escaped."""
    style, script = (Markup(_file(name).strip()) for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("page.html")).render(page=page, style=style, script=script) + "\n"


@cache
def _file(name: str) -> str:
    return files("lpc_lightning.evaluation.report").joinpath("assets", name).read_text(encoding="utf-8")
