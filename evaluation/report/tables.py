"""Tables of a report: means over seeds, differences to a baseline, cost, left-out runs, and all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from lpc_lightning.evaluation.comparison.comparison import SIGNIFICANCE
from lpc_lightning.evaluation.report.contrasts import MIN_SEEDS, Contrast
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.runs.settings import Value
from lpc_lightning.evaluation.report.study import Group, LeftOut, Study, is_numeric
from lpc_lightning.evaluation.report.table_files import (
    NO_VALUE,
    Cell,
    Column,
    Table,
    make_record,
    number_cell,
    text_cell,
)
from lpc_lightning.evaluation.statistics.seeds import MIN_PROMPTS, Estimate, estimate
from lpc_lightning.evaluation.tables import p_value

INTERVAL = "95 % interval"
ADAPTATION = "/adaptation/"
"""Part of the names of metrics of pairs whose annotators have given labels."""
DIFFERENCE_NAMES = (
    "metric",
    "baseline",
    "difference",
    "low",
    "high",
    "prompts",
    "annotators",
    "p",
    "p_holm",
    "p_sign_flips",
    "n",
    "unpaired_seeds",
)
"""Columns of the CSV file of differences, after those of the axes."""


def means_table(study: Study, metrics: Sequence[str]) -> Table:
    """Make the table of each group's mean of each metric, with its interval."""
    # Another grid may have the same axis with values of its own.
    tuned = [axis for axis in _tuned_axes(study) if axis not in study.axes]
    columns = [*_axis_columns(study), *(Column(axis, True) for axis in tuned)]
    for metric in metrics:
        columns += [Column(metric, True), Column(INTERVAL, True), Column("n", True)]
    rows, records = [], []
    for group in study.groups:
        chosen = _tuned_values(group)
        values = {**group.axes, **{axis: _joined(each, " or ") for axis, each in chosen.items()}}
        cells = [text_cell(values[axis]) if axis in values else Cell(NO_VALUE) for axis in (*study.axes, *tuned)]
        for metric in metrics:
            mean = group.estimate(metric)
            cells += [number_cell(mean.mean if mean else None), _interval(mean), _count(mean, group)]
            numbers = asdict(mean) if mean else {**dict.fromkeys(each.name for each in fields(Estimate)), "n": 0}
            axes = {**_axes(study, group), **dict.fromkeys(tuned)}
            axes |= {axis: _joined(each, " ") for axis, each in chosen.items()}
            records.append(make_record(axes, {"metric": metric, **numbers, "runs": len(group.records)}))
        rows.append(cells)
    notes = [
        "Mean over n seeds with Student's 95 % confidence interval. It covers what changes with the seed. If seeds are "
        "scored on the same prompts, it also covers the choice of these prompts (prompts in the CSV file), except for "
        "metrics that the table of left-out runs names: what each prompt adds to them is not on record. One seed, "
        f"fewer than {MIN_PROMPTS} such prompts, or one with most of the pairs give no interval. If n is smaller than "
        "the number of runs, the other runs are listed there, too."
    ]
    if any(ADAPTATION in metric for metric in metrics):
        notes.append(
            "Metrics of adaptation: intervals and p also cover the choice of annotators (annotators in the CSV file), "
            "whose pairs are predicted from the same few labels, except where the table of left-out runs names them."
        )
    return Table("means", "Means over seeds", columns, rows, records, notes)


def contrasts_table(study: Study, contrasts: Sequence[Contrast], baseline: Mapping[str, Value]) -> Table:
    """Make the table of each group's differences to its baseline."""
    several = len({contrast.metric for contrast in contrasts}) > 1
    columns = [*_axis_columns(study), *([Column("metric")] if several else []), Column("against")]
    columns += [Column(name, True) for name in ("difference", INTERVAL, "p", "Holm", "sign flips", "n")]
    columns.append(Column("unpaired seeds"))
    rows, records = [], []
    for contrast in contrasts:
        difference = contrast.difference
        mean = difference.estimate if difference else None
        star = "* " if contrast.is_significant else ""
        cells = [*_axis_cells(study, contrast.group), *([text_cell(contrast.metric)] if several else [])]
        cells += [
            text_cell(study.label(contrast.baseline, *_shared_axes(contrast.group, contrast.baseline))),
            Cell(f"{star}{mean.mean:+.4f}", mean.mean) if mean else Cell(NO_VALUE),
            _interval(mean, "+.4f"),
            _p(difference.p_value if difference else None),
            _p(contrast.p_corrected),
            _p(difference.p_signs if difference else None),
            text_cell(mean.n if mean else 0),
            text_cell(", ".join(contrast.unpaired)),
        ]
        rows.append(cells)
        values = (
            contrast.metric,
            " ".join(f"{axis}={value}" for axis, value in contrast.baseline.axes.items()),
            *((mean.mean, mean.low, mean.high, mean.prompts, mean.annotators) if mean else (None,) * 5),
            difference.p_value if difference else None,
            contrast.p_corrected,
            difference.p_signs if difference else None,
            mean.n if mean else 0,
            " ".join(contrast.unpaired),
        )
        numbers = dict(zip(DIFFERENCE_NAMES, values, strict=True))
        records.append(make_record(_axes(study, contrast.group), numbers))
    count = sum(contrast.p_corrected is not None for contrast in contrasts)
    notes = [
        "Difference to the runs with the same seed and settings, except for "
        + " and ".join(f"{axis}={value}" for axis, value in baseline.items())
        + ". Intervals cover the choice of test prompts as in the table of means; where they do not, there is no p. p: "
        f"paired t-test; Holm: corrected for all {count} tests shown; *: Holm below {SIGNIFICANCE}, over at least "
        f"{MIN_SEEDS} seeds. Sign flips: the exact test over seeds alone. It assumes no normal distribution and is not "
        "corrected; with n seeds it is never below 2^(1 - n). If all differences are equal and no prompts are shared, "
        "t is not defined, and p is that of the sign flips. Fewer than "
        f"{MIN_PROMPTS} test prompts, shared by the seeds, or one with most of the pairs allow no test."
    ]
    names = list(make_record(dict.fromkeys([*study.axes, *study.constant]), dict.fromkeys(DIFFERENCE_NAMES)))
    return Table("differences", "Differences to the baseline", columns, rows, records, notes, names)


def cost_table(study: Study) -> Table:
    """Make the table of each group's parameters, time and memory."""
    names = ("policy parameters", "latent parameters", "seconds", "peak memory (GiB)")
    columns = [*_axis_columns(study), *(Column(name, True) for name in names)]
    rows, records = [], []
    for group in study.groups:
        policy, latent = (_parameter_counts(group.counted, part) for part in ("policy", "latent"))
        seconds, peak = cost(group)
        cells = [_parameters(policy), _parameters(latent), number_cell(seconds.mean if seconds else None, ".1f")]
        cells.append(number_cell(peak, ".2f"))
        rows.append([*_axis_cells(study, group), *cells])
        records.append(
            make_record(
                _axes(study, group),
                {
                    "policy_parameters": " ".join(map(str, policy)) or None,
                    "latent_parameters": " ".join(map(str, latent)) or None,
                    "seconds": seconds.mean if seconds else None,
                    "seconds_low": seconds.low if seconds else None,
                    "seconds_high": seconds.high if seconds else None,
                    "peak_gib": peak,
                },
            )
        )
    notes = [
        "Seconds: mean over seeds. The time of a cell of an ablation includes all its attempts; the time of another "
        "run is its median step time multiplied by its number of steps. Memory: the largest peak of any seed. "
        "Parameters: as recorded by ablate; for another run, the trained parameters in its checkpoint."
    ]
    return Table("cost", "Parameters, time and memory", columns, rows, records, notes)


def left_out_table(entries: Sequence[LeftOut]) -> Table:
    """Make the table of runs that are missing in the other tables, with the reason."""
    columns = [Column("run"), Column("status"), Column("why")]
    rows = [[text_cell(entry.run), text_cell(entry.status), text_cell(last_line(entry.why))] for entry in entries]
    records = [entry._asdict() for entry in entries]
    return Table("left_out", "Left-out runs, and notes", columns, rows, records, names=LeftOut._fields)


def runs_table(study: Study, metrics: Sequence[str]) -> Table:
    """Make the table of all runs. Its records contain all metrics."""
    columns = [Column("seed", True), Column("status"), *(Column(metric, True) for metric in metrics)]
    columns = [*_axis_columns(study), *columns, Column("seconds", True), Column("run")]
    rows, records = [], []
    for group in study.groups:
        for record in group.records:
            values = [number_cell(record.metrics.get(name)) for name in metrics]
            cells = [_seed(record), text_cell(record.status), *values]
            cells += [number_cell(record.seconds, ".1f"), text_cell(record.name)]
            rows.append([*_axis_cells(study, group), *cells])
            records.append(
                make_record(
                    {**_axes(study, group), **record.tuned},
                    {
                        "seed": record.seed,
                        "status": record.status,
                        "run": record.name,
                        "seconds": record.seconds,
                        "peak_bytes": record.peak_bytes,
                        **{f"{part}_parameters": count for part, count in record.parameters.items()},
                        **record.metrics,
                    },
                )
            )
    return Table("runs", "All runs", columns, rows, records)


def cost(group: Group) -> tuple[Estimate | None, float | None]:
    """Return the mean of the seconds over seeds, and the largest peak memory in GiB. None: not recorded."""
    seconds = [record.seconds for record in group.counted if record.seconds is not None]
    peaks = [record.peak_bytes for record in group.counted if record.peak_bytes is not None]
    return estimate(seconds) if seconds else None, max(peaks) / 2**30 if peaks else None


def last_line(text: str) -> str:
    """Return the last non-empty line of a text: the message of a traceback."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _axis_columns(study: Study) -> list[Column]:
    return [Column(axis, is_numeric(values)) for axis, values in study.axes.items()]


def _axis_cells(study: Study, group: Group) -> list[Cell]:
    return [text_cell(group.axes[axis]) if axis in group.axes else Cell(NO_VALUE) for axis in study.axes]


def _tuned_axes(study: Study) -> list[str]:
    return list(dict.fromkeys(axis for record in study.records for axis in record.tuned))


def _tuned_values(group: Group) -> dict[str, list[Value]]:
    """Return the values that the runs of a group have on each tuned axis."""
    values: dict[str, list[Value]] = {}
    for record in group.counted:
        for axis, value in record.tuned.items():
            values[axis] = list(dict.fromkeys([*values.get(axis, ()), value]))
    return values


def _joined(values: Sequence[Value], separator: str) -> Value:
    return values[0] if len(values) == 1 else separator.join(map(str, values))


def _axes(study: Study, group: Group) -> dict[str, Any]:
    return {axis: group.axes.get(axis) for axis in [*study.axes, *study.constant]}


def _shared_axes(group: Group, other: Group) -> list[str]:
    return [axis for axis, value in other.axes.items() if group.axes.get(axis) == value]


def _interval(mean: Estimate | None, form: str = ".4f") -> Cell:
    if mean is None or mean.low is None or mean.high is None:
        return Cell(NO_VALUE)
    # Sorted by width, which is the precision of the mean.
    return Cell(f"[{mean.low:{form}}, {mean.high:{form}}]", mean.high - mean.low)


def _count(mean: Estimate | None, group: Group) -> Cell:
    count, total = mean.n if mean else 0, len(group.records)
    return Cell(str(count) if count == total else f"{count} of {total}", count)


def _p(value: float | None) -> Cell:
    return Cell(NO_VALUE) if value is None else Cell(p_value(value), value)


def _parameter_counts(records: Sequence[RunRecord], part: str) -> list[int]:
    """Return the different numbers of parameters of a part: a single one if all runs agree."""
    return sorted({record.parameters[part] for record in records if part in record.parameters})


def _parameters(counts: Sequence[int]) -> Cell:
    return Cell(" or ".join(f"{count:,}" for count in counts), counts[0]) if counts else Cell(NO_VALUE)


def _seed(record: RunRecord) -> Cell:
    return Cell(NO_VALUE) if record.seed is None else text_cell(record.seed)
