"""Runs as tables over seeds, plots, and one page to open offline."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.figures import write_plots
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.evaluation.report.contrasts import contrasts, read_baseline
from lpc_lightning.evaluation.report.page import Page, picture, run_details, to_html
from lpc_lightning.evaluation.report.plots import draw
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.runs.records import FINISHED, RunProvenance, joined, with_axes
from lpc_lightning.evaluation.report.runs.settings import agreeing, as_value, dotted
from lpc_lightning.evaluation.report.study import ACCURACIES, LeftOut, Study, make_study
from lpc_lightning.evaluation.report.subject import Subject, numeric_axes
from lpc_lightning.evaluation.report.table_files import to_markdown, write_csv, write_table
from lpc_lightning.evaluation.report.tables import (
    contrasts_table,
    cost_table,
    left_out_table,
    means_table,
    runs_table,
)
from lpc_lightning.function_command import run_function

PAGE, TEXT, PLOTS = "report.html", "report.md", "plots"
MOST_TOLD = 40
"""Metrics that an error names."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    run_function(report, arguments[1:], arguments[0])


def report(
    runs: list[str],
    out: str = "report",
    baseline: list[str] | None = None,
    metric: list[str] | None = None,
    x: list[str] | None = None,
    title: str | None = None,
) -> None:
    """Put runs side by side: means over seeds, differences to a baseline, plots, and one page that opens offline.

    Runs that differ in nothing but the seed are a group. Each group gets its mean with Student's 95 % interval, and its
    difference to the group that is like it but for the baseline's settings, seed by seed, with a paired t-test and
    Holm's correction for the number of tests. Runs that failed, are missing or have no number are listed.

    OUT gets report.html, which needs no other file; report.md; means, differences and cost as .md, .csv and .tex;
    runs.csv with every metric of every run; and the plots as .svg and .png in plots/.

    Args:
        runs: Folders that are or hold ablations of `ablate`, runs of `fit`, or results of `evaluate`, which join the
            run that they were measured of. Runs of `fit` are told apart by the settings in which they differ.
        out: Folder for the report.
        baseline: What to compare with, as AXIS=VALUE, one or several: `latent=none`. null: `latent=none` where there
            are such runs, else nothing.
        metric: Metrics to report, by the names that they are logged by, `val/rewards/accuracies`, or as TASK/METRIC for
            benchmarks. null: the accuracy in validation, or in test where no run has validated.
        x: Axes of numbers to draw metrics against. null: all there are.
        title: Of the page. null: the ablation's name.

    Raises:
        ConfigError: No runs there, or no such metric, axis or baseline; names those that there are.
        DataError: A run's file that cannot be read.
    """
    loaded = load_folders(runs)
    records, notes = joined(with_axes(loaded.records), loaded.measured)
    study = make_study(records, loaded.axes)
    metrics = _metrics(study, metric)
    along = _along(study, x)
    compared = read_baseline(study, baseline)
    found, alone = contrasts(study, metrics, compared)
    left_out = [*study.left_out(metrics), *alone, *(LeftOut(*note) for note in notes)]

    tables = [means_table(study, metrics), cost_table(study)]
    if compared:
        tables.insert(1, contrasts_table(study, found, compared))
    left, every = left_out_table(left_out), runs_table(study, metrics)
    against = ", ".join(f"{axis}={value}" for axis, value in compared.items())
    plots, not_drawn = draw(Subject(study, metrics, found, against, along))

    folder = Path(out)
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    for table in (*tables, left):
        write_table(folder, table)
    write_csv(folder / "runs.csv", every.records)
    pictures = [picture(plot, svg) for plot, svg in write_plots(folder / PLOTS, plots)]
    common = agreeing([record.settings for record in records if record.settings])
    page = Page(
        title=title or " and ".join(_names(loaded.makings)) or f"{len(records)} runs",
        summary=_summary(study),
        makings=[RunProvenance(making.name, making.command, _flat(making.facts)) for making in loaded.makings],
        axes=_axes(study),
        settings=common,
        versions=_flat({**provenance(), "command": _command(runs, out, baseline, metric, x, title)}),
        tables=tables,
        pictures=pictures,
        not_drawn=not_drawn,
        left_out=left,
        errors=[each for each in left_out if "\n" in each.why.strip()],
        runs=every,
        details=[run_details(record, common) for record in study.records],
    )
    parts = [f"# {page.title}", page.summary, *map(to_markdown, [*tables, left])]
    parts += [f"## {plot.title}\n\n![{plot.alt}]({PLOTS}/{plot.name}.svg)\n\n{plot.caption}" for plot in plots]
    (folder / TEXT).write_text("\n\n".join(part.rstrip() for part in parts) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(to_html(page), encoding="utf-8")
    print("\n".join(to_markdown(table) for table in tables if table.rows))
    if left_out:
        print(f"{len(left_out)} lines in {folder / left.name}.md tell what is left out, and why.")
    print(f"{page.summary}\nWrote {folder / PAGE}, and tables and plots beside it.")


def _metrics(study: Study, asked: Sequence[str] | None) -> list[str]:
    known = study.metrics
    # Where no run has finished, the page tells why.
    wanted = list(dict.fromkeys(asked or [name for name in ACCURACIES if name in known or not known][:1]))
    if not wanted or (known and set(wanted) - set(known)):
        unknown = [name for name in wanted if name not in known] or list(ACCURACIES)
        whole = sorted((name for name in known), key=lambda name: (name.count("/"), name))
        more = f" and {len(whole) - MOST_TOLD} more" if len(whole) > MOST_TOLD else ""
        raise ConfigError(
            f"metric: no finished run has {' or '.join(unknown)}, expected some of "
            f"{', '.join(whole[:MOST_TOLD])}{more}."
        )
    return wanted


def _along(study: Study, asked: Sequence[str] | None) -> list[str]:
    known = numeric_axes(study)
    if unknown := [axis for axis in asked or () if axis not in known]:
        there = ", ".join(known) or "none here"
        raise ConfigError(f"x: found {', '.join(unknown)}, expected axes of two numbers or more: {there}.")
    return known if asked is None else list(asked)


def _names(makings: Sequence[RunProvenance]) -> list[str]:
    return list(dict.fromkeys(making.name for making in makings))[:3]


def _summary(study: Study) -> str:
    statuses = Counter(record.status for record in study.records)
    counts = [f"{count} {status}" for status, count in sorted(statuses.items(), key=lambda each: each[0] != FINISHED)]
    seeds = sorted({record.seed for record in study.records if record.seed is not None})
    told = f" Seeds: {', '.join(map(str, seeds))}." if seeds else ""
    runs = f"{len(study.records)} run{'s' if len(study.records) > 1 else ''}"
    groups = f"{len(study.groups)} group{'s' if len(study.groups) > 1 else ''}"
    return f"{runs} in {groups}: {', '.join(counts)}.{told}"


def _axes(study: Study) -> dict[str, str]:
    varying = {axis: ", ".join(map(str, values)) for axis, values in study.axes.items()}
    return varying | {axis: f"{value} (in all runs)" for axis, value in study.constant.items()}


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in facts.items() if value not in (None, {}, "")}
    return {name: as_value(value) for name, value in dotted(known).items()}


def _command(runs: Sequence[str], out: str, *given: Sequence[str] | str | None) -> str:
    """The command that makes this report again."""
    flags = []
    for name, value in zip(("baseline", "metric", "x", "title"), given, strict=True):
        if value is not None:
            flags += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return shlex.join(["lpc-lightning", "report", *runs, "--out", out, *flags])
