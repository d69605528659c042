"""What a report says in tables: means over seeds, differences to a baseline, cost, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lpc_lightning.evaluation.comparison.comparison import LEVEL
from lpc_lightning.evaluation.report.contrasts import Contrast
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.runs.settings import Value
from lpc_lightning.evaluation.report.study import Group, LeftOut, Study, is_numeric
from lpc_lightning.evaluation.report.table_files import NOTHING, Cell, Column, Table, number_cell, text_cell
from lpc_lightning.evaluation.statistics.seeds import Estimate, estimate
from lpc_lightning.evaluation.tables import p_value

INTERVAL = "95 % interval"


def means_table(study: Study, metrics: Sequence[str]) -> Table:
    """The mean of each metric in each group, with its interval."""
    columns = _axis_columns(study)
    for metric in metrics:
        columns += [Column(metric, True), Column(INTERVAL, True), Column("n", True)]
    rows, records = [], []
    for group in study.groups:
        cells = _axis_cells(study, group)
        for metric in metrics:
            found = group.estimate(metric)
            cells += [number_cell(found.mean if found else None), _interval(found), _count(found, group)]
            numbers = asdict(found) if found else {"n": 0}
            records.append({**_axes(study, group), "metric": metric, **numbers, "runs": len(group.records)})
        rows.append(cells)
    notes = [
        "Mean over n seeds with Student's 95 % confidence interval. One seed has no interval. n of another number: "
        "the other runs are listed under what is left out."
    ]
    return Table("means", "Means over seeds", columns, rows, records, notes)


def contrasts_table(study: Study, found: Sequence[Contrast], baseline: Mapping[str, Value]) -> Table:
    """Each group's difference to its baseline."""
    several = len({each.metric for each in found}) > 1
    columns = [*_axis_columns(study), *([Column("metric")] if several else []), Column("against")]
    columns += [Column(name, True) for name in ("difference", INTERVAL, "p", "Holm", "sign flips", "n")]
    columns.append(Column("seeds without a partner"))
    rows, records = [], []
    for each in found:
        tested = each.difference
        mean = tested.estimate if tested else None
        star = "* " if each.p_corrected is not None and each.p_corrected < LEVEL else ""
        cells = [*_axis_cells(study, each.group), *([text_cell(each.metric)] if several else [])]
        cells += [
            text_cell(study.label(each.baseline, *_alike(each.group, each.baseline))),
            Cell(f"{star}{mean.mean:+.4f}", mean.mean) if mean else Cell(NOTHING),
            _interval(mean, "+.4f"),
            _p(tested.p_value if tested else None),
            _p(each.p_corrected),
            _p(tested.p_signs if tested else None),
            text_cell(mean.n if mean else 0),
            text_cell(", ".join(each.unpaired)),
        ]
        rows.append(cells)
        records.append(
            {
                **_axes(study, each.group),
                "metric": each.metric,
                "baseline": " ".join(f"{axis}={value}" for axis, value in each.baseline.axes.items()),
                "difference": mean.mean if mean else None,
                "low": mean.low if mean else None,
                "high": mean.high if mean else None,
                "p": tested.p_value if tested else None,
                "p_holm": each.p_corrected,
                "p_sign_flips": tested.p_signs if tested else None,
                "n": mean.n if mean else 0,
                "unpaired_seeds": " ".join(each.unpaired),
            }
        )
    count = sum(each.p_corrected is not None for each in found)
    notes = [
        "Less the runs with the same seed and settings, but for "
        + " and ".join(f"{axis}={value}" for axis, value in baseline.items())
        + f". p: paired t-test; Holm: corrected for all {count} tests shown; *: Holm below {LEVEL}. Sign flips: the "
        "exact test that assumes no normal distribution, not corrected; with n seeds it is never below 2^(1 - n). "
        "Where all differences are equal, t is not defined, and p is that of sign flips."
    ]
    return Table("differences", "Differences to the baseline", columns, rows, records, notes)


def cost_table(study: Study) -> Table:
    """Parameters, time and memory of each group."""
    names = ("policy parameters", "latent parameters", "seconds", "peak memory (GiB)")
    columns = [*_axis_columns(study), *(Column(name, True) for name in names)]
    rows, records = [], []
    for group in study.groups:
        policy, latent = (_same(group.counted, part) for part in ("policy", "latent"))
        seconds, peak = cost(group)
        cells = [_parameters(policy), _parameters(latent), number_cell(seconds.mean if seconds else None, ".1f")]
        cells.append(number_cell(peak, ".2f"))
        rows.append([*_axis_cells(study, group), *cells])
        records.append(
            {
                **_axes(study, group),
                "policy_parameters": " ".join(map(str, policy)) or None,
                "latent_parameters": " ".join(map(str, latent)) or None,
                "seconds": seconds.mean if seconds else None,
                "seconds_low": seconds.low if seconds else None,
                "seconds_high": seconds.high if seconds else None,
                "peak_gib": peak,
            }
        )
    notes = [
        "Seconds: mean over seeds; of a cell of an ablation, the whole cell with all its attempts; of another run, its "
        "median step times its steps. Memory: the largest peak of any seed. Parameters: as ablate recorded them; of "
        "another run, those in its checkpoint, which are the trained ones."
    ]
    return Table("cost", "Parameters, time and memory", columns, rows, records, notes)


def left_out_table(found: Sequence[LeftOut]) -> Table:
    """Runs that are missing in the other tables, and why."""
    columns = [Column("run"), Column("status"), Column("why")]
    rows = [[text_cell(each.run), text_cell(each.status), text_cell(last_line(each.why))] for each in found]
    return Table("left_out", "What is left out, and what to know", columns, rows, [each._asdict() for each in found])


def runs_table(study: Study, metrics: Sequence[str]) -> Table:
    """Every run; its CSV file holds all metrics."""
    columns = [Column("seed", True), Column("status"), *(Column(metric, True) for metric in metrics)]
    columns = [*_axis_columns(study), *columns, Column("seconds", True), Column("run")]
    rows, records = [], []
    for group in study.groups:
        for each in group.records:
            cells = [_seed(each), text_cell(each.status), *(number_cell(each.metrics.get(name)) for name in metrics)]
            cells += [number_cell(each.seconds, ".1f"), text_cell(each.name)]
            rows.append([*_axis_cells(study, group), *cells])
            records.append(
                {
                    **_axes(study, group),
                    "seed": each.seed,
                    "status": each.status,
                    "run": each.name,
                    "seconds": each.seconds,
                    "peak_bytes": each.peak_bytes,
                    **{f"{part}_parameters": count for part, count in each.parameters.items()},
                    **each.metrics,
                }
            )
    return Table("runs", "Every run", columns, rows, records)


def cost(group: Group) -> tuple[Estimate | None, float | None]:
    """Seconds over seeds, and the largest peak memory in GiB."""
    seconds = [each.seconds for each in group.counted if each.seconds is not None]
    peaks = [each.peak_bytes for each in group.counted if each.peak_bytes is not None]
    return estimate(seconds) if seconds else None, max(peaks) / 2**30 if peaks else None


def last_line(text: str) -> str:
    """What an error says, out of its traceback."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _axis_columns(study: Study) -> list[Column]:
    return [Column(axis, is_numeric(values)) for axis, values in study.axes.items()]


def _axis_cells(study: Study, group: Group) -> list[Cell]:
    return [text_cell(group.axes[axis]) if axis in group.axes else Cell(NOTHING) for axis in study.axes]


def _axes(study: Study, group: Group) -> dict[str, Any]:
    return {axis: group.axes.get(axis) for axis in [*study.axes, *study.constant]}


def _alike(group: Group, other: Group) -> list[str]:
    return [axis for axis, value in other.axes.items() if group.axes.get(axis) == value]


def _interval(found: Estimate | None, form: str = ".4f") -> Cell:
    if found is None or found.low is None or found.high is None:
        return Cell(NOTHING)
    # Sorted by its width: how sure the mean is.
    return Cell(f"[{found.low:{form}}, {found.high:{form}}]", found.high - found.low)


def _count(found: Estimate | None, group: Group) -> Cell:
    count, whole = found.n if found else 0, len(group.records)
    return Cell(str(count) if count == whole else f"{count} of {whole}", count)


def _p(value: float | None) -> Cell:
    return Cell(NOTHING) if value is None else Cell(p_value(value), value)


def _same(records: Sequence[RunRecord], part: str) -> list[int]:
    """Counts of parameters; one, where all runs agree."""
    return sorted({each.parameters[part] for each in records if part in each.parameters})


def _parameters(counts: Sequence[int]) -> Cell:
    return Cell(" or ".join(f"{count:,}" for count in counts), counts[0]) if counts else Cell(NOTHING)


def _seed(record: RunRecord) -> Cell:
    return Cell(NOTHING) if record.seed is None else text_cell(record.seed)
