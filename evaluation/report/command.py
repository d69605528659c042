"""Command `report`: runs as tables over seeds, plots, and one HTML page that opens offline."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpc_lightning.cli.function_command import run_function
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.figures import write_plots
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.evaluation.report.contrasts import contrasts, read_baseline
from lpc_lightning.evaluation.report.page import Page, make_picture, render_page, run_details
from lpc_lightning.evaluation.report.plots import draw
from lpc_lightning.evaluation.report.run_tables import run_tables
from lpc_lightning.evaluation.report.runs.differences import add_axes
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.runs.records import FINISHED, RunProvenance, check_conditions, join_measurements
from lpc_lightning.evaluation.report.runs.settings import as_value, common_settings, flatten
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
from lpc_lightning.evaluation.report.tuning_table import tuning_table
from lpc_lightning.files.json_files import write_text
from lpc_lightning.files.markdown import escape_markdown
from lpc_lightning.files.output_paths import check_folder, claim_output_folder

PAGE, TEXT, RUNS, PLOTS = "report.html", "report.md", "runs.csv", "plots"
GENERATOR = '<meta name="generator" content="lpc-lightning report">'
"""Line of every page, by which an earlier report is recognised."""
MAX_LISTED = 40
"""Most metrics that an error lists."""


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
    """Compare runs: means over seeds, differences to a baseline, plots, and one page that opens offline.

    Runs that differ only in the seed form a group. Runs of different grids and fits are separated by every further
    setting in which they differ, unless it cannot change a result, such as a path of outputs. Each group gets its mean
    with a 95 % interval, which also covers the choice of test prompts if seeds share them. It also gets its difference
    to the group that has the baseline's settings and agrees in all others. The difference is taken seed by seed, with a
    paired t-test and Holm's correction for the number of tests. Fewer than four shared test prompts allow neither.
    There is no test if what each test prompt adds to a metric is not on record, as for runs of `fit`. Runs that failed,
    are missing or have no value of a metric are listed.

    OUT contains report.html, which needs no other file and also has the codes and the samples of runs; report.md;
    means, differences, tuning and cost as .md, .csv and .tex; runs.csv with every metric of every run; and the plots as
    .svg and .png in plots/.

    Args:
        runs: Folders that are or contain ablations of `ablate`, runs of `fit`, or results of `evaluate`. Results are
            added to the run whose checkpoint was measured. Runs of `fit` are distinguished by the settings in which
            they differ.
        out: Folder for the report.
        baseline: Settings to compare with, as AXIS=VALUE, one or several: `latent=none`. null: `latent=none` if there
            are such runs, else no comparison.
        metric: Metrics to report by their logged names, such as `val/rewards/accuracies`, or as TASK/METRIC for
            benchmarks. null: the accuracy in validation; in test if no run has validated, or if a grid has
            chosen values in validation (`tune`).
        x: Numeric axes to plot metrics against. null: all of them.
        title: Title of the page. null: the ablation's name.

    Raises:
        ConfigError: There are no runs, or there is no such metric, axis or baseline. The error lists the valid ones. Or
            a metric was measured under different conditions.
        DataError: A file of a run cannot be read.
    """
    folder = Path(out)
    _check_replaceable(folder)
    with claim_output_folder(folder, "out"):
        loaded = load_folders(runs)
        records, notes = join_measurements(add_axes(loaded.records), loaded.measurements)
        study = make_study(records, loaded.axes)
        metrics = _select_metrics(study, metric, is_tuned=bool(loaded.tunings))
        check_conditions(records, metrics)
        selected_axes = _select_axes(study, x)
        baseline_axes = read_baseline(study, baseline)
        compared, unmatched = contrasts(study, metrics, baseline_axes)
        left_out = [*study.left_out(metrics), *unmatched, *(LeftOut(*note) for note in notes)]

        tables = [means_table(study, metrics), cost_table(study)]
        if loaded.tunings:
            tables.insert(1, tuning_table(loaded.tunings))
        if baseline_axes:
            tables.insert(1, contrasts_table(study, compared, baseline_axes))
        missing, all_runs = left_out_table(left_out), runs_table(study, metrics)
        baseline_name = ", ".join(f"{axis}={value}" for axis, value in baseline_axes.items())
        plots, not_drawn = draw(Subject(study, metrics, compared, baseline_name, selected_axes))

        (folder / PLOTS).mkdir(parents=True, exist_ok=True)
        for table in (*tables, missing):
            write_table(folder, table)
        write_csv(folder / RUNS, all_runs.records)
        pictures = [make_picture(plot, svg) for plot, svg in write_plots(folder / PLOTS, plots)]
        common = common_settings([record.settings for record in records if record.settings])
        page = Page(
            title=title or " and ".join(_names(loaded.origins)) or f"{len(records)} runs",
            summary=_summary(study),
            origins=[RunProvenance(origin.name, origin.command, _flatten(origin.facts)) for origin in loaded.origins],
            axes=_describe_axes(study),
            settings=common,
            versions=_flatten({**provenance(), "command": _command(runs, out, baseline, metric, x, title)}),
            tables=tables,
            pictures=pictures,
            not_drawn=not_drawn,
            run_tables=run_tables(study.records),
            left_out=missing,
            errors=[entry for entry in left_out if "\n" in entry.why.strip()],
            runs=all_runs,
            details=[run_details(record, common) for record in study.records],
        )
        parts = [
            f"# {escape_markdown(page.title)}",
            escape_markdown(page.summary),
            *map(to_markdown, [*tables, missing]),
        ]
        for plot in plots:
            heading, alt, caption = map(escape_markdown, (plot.title, plot.alt, plot.caption))
            parts.append(f"## {heading}\n\n![{alt}]({PLOTS}/{plot.name}.svg)\n\n{caption}")
        write_text(folder / TEXT, "\n\n".join(part.rstrip() for part in parts) + "\n")
        write_text(folder / PAGE, render_page(page))
        print("\n".join(to_markdown(table) for table in tables if table.rows))
        if left_out:
            print(f"{folder / missing.name}.md lists what is left out and why: {len(left_out)} lines.")
        print(f"{page.summary}\nWrote {folder / PAGE}, and tables and plots beside it.")


def _check_replaceable(folder: Path) -> None:
    """Check that the files to write are new, or those of an earlier report."""
    check_folder(folder, "out")
    page = folder / PAGE
    existing = [path for path in (page, folder / TEXT, folder / RUNS) if path.exists()]
    is_report = page.is_file() and GENERATOR in page.read_text(encoding="utf-8", errors="replace")
    if existing and not is_report:
        raise ConfigError(
            f"out: {existing[0]} exists and is not of an earlier report, expected another folder (--out), or move it."
        )


def _select_metrics(study: Study, names: Sequence[str] | None, is_tuned: bool) -> list[str]:
    available = study.metrics
    # Validation has chosen the values of a tuned axis.
    defaults = reversed(ACCURACIES) if is_tuned else ACCURACIES
    # If no run has finished, any metric is accepted: the report then contains the errors of the runs.
    selected = list(dict.fromkeys(names or [name for name in defaults if name in available or not available][:1]))
    if not selected or (available and set(selected) - set(available)):
        unknown = [name for name in selected if name not in available] or list(ACCURACIES)
        ordered = sorted(available, key=lambda name: (name.count("/"), name))
        more = f" and {len(ordered) - MAX_LISTED} more" if len(ordered) > MAX_LISTED else ""
        raise ConfigError(
            f"metric: no finished run has {' or '.join(unknown)}, expected some of "
            f"{', '.join(ordered[:MAX_LISTED])}{more}."
        )
    return selected


def _select_axes(study: Study, names: Sequence[str] | None) -> list[str]:
    available = numeric_axes(study)
    if unknown := [axis for axis in names or () if axis not in available]:
        expected = ", ".join(available) or "none in these runs"
        raise ConfigError(f"x: found {', '.join(unknown)}, expected axes with two numbers or more: {expected}.")
    return available if names is None else list(names)


def _names(origins: Sequence[RunProvenance]) -> list[str]:
    return list(dict.fromkeys(origin.name for origin in origins))[:3]


def _summary(study: Study) -> str:
    statuses = Counter(record.status for record in study.records)
    counts = [f"{count} {status}" for status, count in sorted(statuses.items(), key=lambda item: item[0] != FINISHED)]
    seeds = sorted({record.seed for record in study.records if record.seed is not None})
    seed_list = f" Seeds: {', '.join(map(str, seeds))}." if seeds else ""
    runs = f"{len(study.records)} run{'s' if len(study.records) > 1 else ''}"
    groups = f"{len(study.groups)} group{'s' if len(study.groups) > 1 else ''}"
    return f"{runs} in {groups}: {', '.join(counts)}.{seed_list}"


def _describe_axes(study: Study) -> dict[str, str]:
    varying = {axis: ", ".join(map(str, values)) for axis, values in study.axes.items()}
    return varying | {axis: f"{value} (in all runs)" for axis, value in study.constant.items()}


def _flatten(facts: Mapping[str, Any]) -> dict[str, Any]:
    present = {name: value for name, value in facts.items() if value not in (None, {}, "")}
    return {name: as_value(value) for name, value in flatten(present).items()}


def _command(runs: Sequence[str], out: str, *options: Sequence[str] | str | None) -> str:
    """Return the command that makes this report again."""
    flags = []
    for name, value in zip(("baseline", "metric", "x", "title"), options, strict=True):
        if value is not None:
            flags += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return shlex.join(["lpc-lightning", "report", *runs, "--out", out, *flags])
