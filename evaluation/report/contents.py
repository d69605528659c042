"""Contents of a report: the runs that it compares, its tables, and its page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.figures import NoPlot
from lpc_lightning.evaluation.provenance import provenance
from lpc_lightning.evaluation.report.contrasts import contrasts, read_baseline
from lpc_lightning.evaluation.report.page import Page, Picture, run_details
from lpc_lightning.evaluation.report.run_tables import run_tables
from lpc_lightning.evaluation.report.runs.differences import add_axes
from lpc_lightning.evaluation.report.runs.folders import load_folders
from lpc_lightning.evaluation.report.runs.inputs import other_inputs
from lpc_lightning.evaluation.report.runs.records import (
    FINISHED,
    RunProvenance,
    RunRecord,
    check_conditions,
    join_measurements,
)
from lpc_lightning.evaluation.report.runs.settings import WEIGHTS, as_value, common_settings, flatten
from lpc_lightning.evaluation.report.study import ACCURACIES, LeftOut, Study, make_study
from lpc_lightning.evaluation.report.subject import Subject, numeric_axes
from lpc_lightning.evaluation.report.table_files import Table
from lpc_lightning.evaluation.report.tables import (
    contrasts_table,
    cost_table,
    left_out_table,
    means_table,
    runs_table,
)
from lpc_lightning.evaluation.report.tuning_table import tuning_table, unequal_tunings

MAX_LISTED = 40
"""Most metrics that an error lists."""


@dataclass(frozen=True)
class Contents:
    """Everything that a report shows, before it is drawn and written."""

    subject: Subject
    """The compared runs, with what is drawn of them."""
    tables: Sequence[Table]
    """Means, differences, tuning and cost."""
    left_out: Sequence[LeftOut]
    """Runs that are missing in a table, and notes on others."""
    origins: Sequence[RunProvenance]
    """Origin of the runs."""
    unequal: Sequence[LeftOut] = ()
    """Groups that were not tuned at all values that others were, also among `left_out`."""
    other_inputs: Sequence[LeftOut] = ()
    """Cells with other files or other code than a later one, also among `left_out`."""

    @cached_property
    def missing(self) -> Table:
        """Table of `left_out`."""
        return left_out_table(self.left_out)

    @cached_property
    def all_runs(self) -> Table:
        """Table with every metric of every run."""
        return runs_table(self.subject.study, self.subject.metrics)


def read_contents(
    runs: Sequence[str], baseline: Sequence[str] | None, metric: Sequence[str] | None, x: Sequence[str] | None
) -> Contents:
    """Read the runs, and compute the tables. See `report` for arguments and errors."""
    loaded = load_folders(runs)
    records, notes = join_measurements(add_axes(loaded.records), loaded.measurements)
    study = make_study(records, loaded.axes)
    metrics = _select_metrics(study, metric, is_selected=bool(loaded.tunings) or any(map(_has_best, records)))
    check_conditions(records, metrics)
    selected_axes = _select_axes(study, x)
    baseline_axes = read_baseline(study, baseline)
    compared, unmatched = contrasts(study, metrics, baseline_axes)
    tables = [means_table(study, metrics)]
    if baseline_axes:
        tables.append(contrasts_table(study, compared, baseline_axes))
    if loaded.tunings:
        tables.append(tuning_table(study, loaded.tunings))
    unequal, other = unequal_tunings(loaded.tunings), _other_inputs(study)
    baseline_name = ", ".join(f"{axis}={value}" for axis, value in baseline_axes.items())
    return Contents(
        Subject(study, metrics, compared, baseline_name, selected_axes),
        [*tables, cost_table(study)],
        [*study.left_out(metrics), *unmatched, *unequal, *other, *(LeftOut(*note) for note in notes)],
        loaded.origins,
        unequal,
        other,
    )


def build_page(
    contents: Contents, pictures: Sequence[Picture], not_drawn: Sequence[NoPlot], title: str | None, command: str
) -> Page:
    """Return the page of a report.

    Args:
        contents: The contents.
        pictures: The plots.
        not_drawn: Plots without data.
        title: Title of the page. None: the names of the ablations.
        command: Command that makes the report again.
    """
    study = contents.subject.study
    common = common_settings([record.settings for record in study.records if record.settings])
    names = list(dict.fromkeys(origin.name for origin in contents.origins))[:3]
    return Page(
        title=title or " and ".join(names) or f"{len(study.records)} runs",
        summary=f"{_summary(study)}{_input_differences(contents.other_inputs)}{_tuning_differences(contents.unequal)}",
        origins=[RunProvenance(origin.name, origin.command, _flatten(origin.facts)) for origin in contents.origins],
        axes=_describe_axes(study),
        settings=common,
        versions=_flatten({**provenance(), "command": command}),
        tables=contents.tables,
        pictures=pictures,
        not_drawn=not_drawn,
        run_tables=run_tables(study.records),
        left_out=contents.missing,
        errors=[entry for entry in contents.left_out if "\n" in entry.why.strip()],
        runs=contents.all_runs,
        details=[run_details(record, common) for record in study.records],
    )


def _has_best(record: RunRecord) -> bool:
    """True if the validation accuracy of a run is that of the weights that validation has chosen."""
    validation, _ = ACCURACIES
    return any(each.get(WEIGHTS) == "best" for each in (record.settings, record.conditions.get(validation, {})))


def _select_metrics(study: Study, names: Sequence[str] | None, is_selected: bool) -> list[str]:
    available = study.metrics
    # If no run has finished, any metric is accepted: the report then contains the errors of the runs.
    selected = list(dict.fromkeys(names or _default_metrics(study, is_selected)))
    if not selected or (available and set(selected) - set(available)):
        unknown = [name for name in selected if name not in available] or list(ACCURACIES)
        ordered = sorted(available, key=lambda name: (name.count("/"), name))
        more = f" and {len(ordered) - MAX_LISTED} more" if len(ordered) > MAX_LISTED else ""
        raise ConfigError(
            f"metric: no finished run has {' or '.join(unknown)}, expected some of "
            f"{', '.join(ordered[:MAX_LISTED])}{more}."
        )
    return selected


def _default_metrics(study: Study, is_selected: bool) -> list[str]:
    """Return the accuracy that all counted runs have, else the one that some have. Empty: they have neither.

    Args:
        study: The runs.
        is_selected: True if validation has chosen the values of a tuned axis, or the best weights. If all runs have
            both accuracies, that of the test is returned.
    """
    ordered = list(reversed(ACCURACIES)) if is_selected else list(ACCURACIES)
    counts = {name: sum(len(group.values(name)) for group in study.groups) for name in ordered}
    runs = sum(len(group.counted) for group in study.groups)
    having = [name for name in ordered if name in study.metrics or not study.metrics]
    return sorted(having, key=lambda name: counts[name] < runs)[:1]


def _select_axes(study: Study, names: Sequence[str] | None) -> list[str]:
    available = numeric_axes(study)
    if unknown := [axis for axis in names or () if axis not in available]:
        expected = ", ".join(available) or "none in these runs"
        raise ConfigError(f"x: found {', '.join(unknown)}, expected axes with two numbers or more: {expected}.")
    return available if names is None else list(names)


def _summary(study: Study) -> str:
    statuses = Counter(record.status for record in study.records)
    counts = [f"{count} {status}" for status, count in sorted(statuses.items(), key=lambda item: item[0] != FINISHED)]
    seeds = {record.seed for record in study.records if record.seed is not None}
    ordered = sorted(seeds, key=lambda seed: (isinstance(seed, str), seed))
    seed_list = f" Seeds: {', '.join(map(str, ordered))}." if seeds else ""
    runs = f"{len(study.records)} run{'s' if len(study.records) > 1 else ''}"
    groups = f"{len(study.groups)} group{'s' if len(study.groups) > 1 else ''}"
    return f"{runs} in {groups}: {', '.join(counts)}.{seed_list}{_version_differences(study)}"


def _version_differences(study: Study) -> str:
    """Return a sentence about versions in which the runs of the tables differ. They are no axes of a comparison."""
    versions = [record.versions for record in study.records if record.counted]
    differing = []
    for name in sorted({name for each in versions for name in each} - {"date"}):
        counts = Counter(str(each.get(name, "not recorded")) for each in versions)
        if len(counts) > 1:
            runs = ", ".join(
                f"{value} ({count} run{'s' if count > 1 else ''})" for value, count in counts.most_common()
            )
            differing.append(f"{name}: {runs}")
    return f" The runs differ in versions: {'; '.join(differing)}." if differing else ""


def _other_inputs(study: Study) -> list[LeftOut]:
    """List the cells of the tables that had other files or other code than a later one."""
    cells = [(record, record.inputs) for group in study.groups for record in group.counted if record.inputs is not None]
    differences = other_inputs([inputs for _, inputs in cells])
    return [LeftOut(cells[each.number][0].name, each.kind, each.why) for each in differences]


def _input_differences(other: Sequence[LeftOut]) -> str:
    """Return a sentence for each kind of input in which cells differ from a later one."""
    counts = Counter(entry.status for entry in other)
    return "".join(f" {count} run{'s' * (count > 1)} had {kind} than a later run." for kind, count in counts.items())


def _tuning_differences(unequal: Sequence[LeftOut]) -> str:
    """Return a sentence about groups that were not tuned at all values that others were."""
    groups = "; ".join(f"{entry.run} ({entry.why})" for entry in unequal)
    return f" The groups were not tuned at the same values: {groups}." if unequal else ""


def _describe_axes(study: Study) -> dict[str, str]:
    varying = {axis: ", ".join(map(str, values)) for axis, values in study.axes.items()}
    return varying | {axis: f"{value} (in all runs)" for axis, value in study.constant.items()}


def _flatten(facts: Mapping[str, Any]) -> dict[str, Any]:
    present = {name: value for name, value in facts.items() if value not in (None, {}, "")}
    return {name: as_value(value) for name, value in flatten(present).items()}
