"""A report as one self-contained HTML page."""

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
from lpc_lightning.evaluation.report.run_tables import RunTables
from lpc_lightning.evaluation.report.runs.records import RunProvenance, RunRecord
from lpc_lightning.evaluation.report.study import LeftOut
from lpc_lightning.evaluation.report.table_files import Table

PIXELS_PER_INCH = 96
"""Resolution of CSS pixels."""


@dataclass(frozen=True)
class Picture:
    """A plot in a page."""

    title: str
    source: str
    """Data URL of the SVG."""
    alt: str
    caption: str
    width: int
    """Width in CSS pixels."""
    height: int
    """Height in CSS pixels."""


@dataclass(frozen=True)
class RunDetails:
    """The part of the page about one run, as values by label."""

    name: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    metrics: Mapping[str, str]


@dataclass(frozen=True)
class Page:
    """The content of a page."""

    title: str
    summary: str
    origins: Sequence[RunProvenance]
    axes: Mapping[str, str]
    settings: Mapping[str, Any]
    """Settings in which all runs agree."""
    versions: Mapping[str, Any]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    not_drawn: Sequence[NoPlot]
    run_tables: Sequence[RunTables]
    left_out: Table
    errors: Sequence[LeftOut]
    """Errors of several lines, of which the table shows only the last one."""
    runs: Table
    details: Sequence[RunDetails]
    files: Sequence[str] = ()
    """Files of the report, relative to its folder. A later report into the same folder replaces them."""


def make_picture(plot: Plot, svg: bytes) -> Picture:
    """Embed the SVG of a plot as a data URL, so that its ids and styles do not mix with those of the page."""
    width, height = (round(inches * PIXELS_PER_INCH) for inches in plot.figure.get_size_inches())
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return Picture(plot.title, source, plot.alt, plot.caption, width, height)


def run_details(record: RunRecord, common: Mapping[str, Any]) -> RunDetails:
    """Make the part of the page about one run: its own settings, and its metrics without those of groups of pairs.

    Args:
        record: The run.
        common: Settings in which all runs agree. They are left out.
    """
    facts: dict[str, Any] = {**record.axes, "seed": record.seed, "status": record.status, "folder": record.folder}
    facts |= {f"{part} parameters": f"{count:,}" for part, count in record.parameters.items()}
    return RunDetails(
        record.name,
        {name: "-" if value is None else value for name, value in facts.items()},
        {name: value for name, value in record.settings.items() if name not in common},
        {name: f"{value:.6g}" for name, value in record.metrics.items() if name.count("/") < 3},
    )


def render_page(page: Page) -> str:
    """Return the page as HTML. All content is escaped."""
    style, script = (Markup(_read_asset(name).strip()) for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_read_asset("page.html")).render(page=page, style=style, script=script) + "\n"


@cache
def _read_asset(name: str) -> str:
    return files("lpc_lightning.evaluation.report").joinpath("assets", name).read_text(encoding="utf-8")
