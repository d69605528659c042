"""Tables over the seeds of runs, plots, and one HTML page that opens offline."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lpc_lightning.cli.function_command import run_function
from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.figures import Plot, write_plots
from lpc_lightning.evaluation.report.contents import Contents, build_page, read_contents
from lpc_lightning.evaluation.report.page import Page, Picture, make_picture, render_page
from lpc_lightning.evaluation.report.plots import draw
from lpc_lightning.evaluation.report.table_files import to_markdown, write_table
from lpc_lightning.files.csv_files import write_csv
from lpc_lightning.files.json_files import write_text
from lpc_lightning.files.markdown import escape_markdown
from lpc_lightning.files.output_paths import check_folder, claim_output_folder

PAGE, TEXT, RUNS, PLOTS = "report.html", "report.md", "runs.csv", "plots"
GENERATOR = '<meta name="generator" content="lpc-lightning report">'
"""Line of every page, by which an earlier report is recognized."""
FILES = re.compile("<meta name=\"files\" content='(.*)'>")
"""Line of every page with the files of its report."""


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
    are missing or have no value of a metric are listed. If runs differ in git revision, packages or platform, which are
    no settings, the summary says so. It also says so if cells had other files or other code than a later cell, which
    are then listed, and if groups were not tuned at the same values.

    OUT contains report.html, which needs no other file and also has the codes and the samples of runs; report.md;
    means, differences, tuning and cost as .md, .csv and .tex; runs.csv with every metric of every run; and the plots as
    .svg and .png in plots/. An earlier report in OUT is replaced, with all files that it wrote. Other files stay.

    Args:
        runs: Folders that are or contain ablations of `ablate`, runs of `fit`, or results of `evaluate`. Results are
            added to the run whose checkpoint was measured. Runs of `fit` are distinguished by the settings in which
            they differ.
        out: Folder for the report.
        baseline: Settings to compare with, as AXIS=VALUE, one or several: `latent=none`. null: `latent=none` if there
            are such runs, else no comparison.
        metric: Metrics to report by their logged names, such as `val/rewards/accuracies`, or as TASK/METRIC for
            benchmarks. null: the accuracy in validation or in test that all runs have. If they have both, that in
            validation, or in test if validation has chosen values (`tune`) or the weights that it measured (`best`).
        x: Numeric axes to plot metrics against. null: all of them.
        title: Title of the page. null: the ablation's name.

    Raises:
        ConfigError: There are no runs, or there is no such metric, axis or baseline. The error lists the valid ones. Or
            a metric was measured under different conditions.
        DataError: A file of a run cannot be read.
    """
    folder = Path(out)
    _check_replaceable(folder)
    with claim_output_folder(folder, "out"), TemporaryDirectory(prefix=".report-", dir=folder) as temporary:
        contents = read_contents(runs, baseline, metric, x)
        plots, not_drawn = draw(contents.subject)
        new = Path(temporary)
        pictures = _write_parts(new, contents, plots)
        page = build_page(contents, pictures, not_drawn, title, _command(runs, out, baseline, metric, x, title))
        write_text(new / TEXT, _text(page, plots))
        write_text(new / PAGE, render_page(replace(page, files=[*_files(new), PAGE])))
        _replace(folder, new)
        print("\n".join(to_markdown(table) for table in page.tables if table.rows))
        if contents.left_out:
            print(f"{folder / page.left_out.name}.md lists what is left out and why: {len(contents.left_out)} lines.")
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


def _files(folder: Path) -> list[str]:
    """Return the files in a folder and below it, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _replace(folder: Path, new: Path) -> None:
    """Move the files of a new report into a folder, the page last. Remove other files of an earlier report there."""
    page, files = folder / PAGE, _files(new)
    listed = FILES.search(page.read_text(encoding="utf-8", errors="replace")) if page.is_file() else None
    for name in map(Path, json.loads(listed[1]) if listed else []):
        is_own = name.parent in (Path(), Path(PLOTS)) and (folder / name).is_file()
        if is_own and name.as_posix() not in files:
            (folder / name).unlink()
    (folder / PLOTS).mkdir(exist_ok=True)
    for file in sorted(files, key=lambda name: name == PAGE):
        os.replace(new / file, folder / file)


def _write_parts(folder: Path, contents: Contents, plots: Sequence[Plot]) -> list[Picture]:
    """Write tables and plots, and return the plots as pictures of the page."""
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    for table in (*contents.tables, contents.missing):
        write_table(folder, table)
    write_csv(folder / RUNS, contents.all_runs.records)
    return [make_picture(plot, svg) for plot, svg in write_plots(folder / PLOTS, plots)]


def _text(page: Page, plots: Sequence[Plot]) -> str:
    """Return the tables and plots of a page in Markdown."""
    tables = map(to_markdown, [*page.tables, page.left_out])
    parts = [f"# {escape_markdown(page.title)}", escape_markdown(page.summary), *tables]
    for plot in plots:
        heading, alt, caption = map(escape_markdown, (plot.title, plot.alt, plot.caption))
        parts.append(f"## {heading}\n\n![{alt}]({PLOTS}/{plot.name}.svg)\n\n{caption}")
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _command(runs: Sequence[str], out: str, *options: Sequence[str] | str | None) -> str:
    """Return the command that makes this report again."""
    flags = []
    for name, value in zip(("baseline", "metric", "x", "title"), options, strict=True):
        if value is not None:
            flags += [f"--{name}", *([value] if isinstance(value, str) else value)]
    return shlex.join(["lpc-lightning", "report", *runs, "--out", out, *flags])
