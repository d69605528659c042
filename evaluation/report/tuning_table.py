"""A report's table of tuned axes: the scores of all values, and the chosen ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from lpc_lightning.evaluation.report.runs.records import GroupTuning
from lpc_lightning.evaluation.report.runs.settings import Value
from lpc_lightning.evaluation.report.study import LeftOut, Study
from lpc_lightning.evaluation.report.table_files import (
    NO_VALUE,
    Cell,
    Column,
    Table,
    make_record,
    number_cell,
    text_cell,
)


def tuning_table(study: Study, tunings: Sequence[GroupTuning]) -> Table:
    """Make the table of the tuning of each group, with a column for each value.

    Groups of several ablations can agree in all axes. They then have the names of their ablations in the first column.
    Its records have a line for each value and seed. The axes are those of the report's other tables.
    """
    has_several = len({tuning.ablation for tuning in tunings}) > 1
    known = {axis for tuning in tunings for axis in tuning.axes}
    axes, constant = ([axis for axis in part if axis in known] for part in (study.axes, study.constant))
    tuned = list(dict.fromkeys(tuning.axis for tuning in tunings))
    values = sorted({float(value) for tuning in tunings for value in tuning.scores})
    columns = [Column("ablation")] if has_several else []
    columns += [*map(Column, axes), *(Column(name, True) for name in tuned)]
    columns += [*(Column(f"at {value:g}", True) for value in values), Column("note")]
    rows, records = [], []
    for tuning in tunings:
        cells = [text_cell(tuning.ablation)] if has_several else []
        cells += [text_cell(tuning.axes[axis]) if axis in tuning.axes else Cell(NO_VALUE) for axis in axes]
        cells += [text_cell(tuning.value) if tuning.axis == name else Cell(NO_VALUE) for name in tuned]
        cells += [_score(tuning, value) for value in values]
        note = "; ".join(each for each in (tuning.note, _untried(tuning, tunings)) if each)
        rows.append([*cells, text_cell(note)])
        records += _records(tuning, note, [*axes, *constant], {"ablation": tuning.ablation} if has_several else {})
    sections = [f"{tuning.section}." for tuning in tunings]
    notes = [
        "The mean score over the tuning seeds at each value; *: the chosen value; +: a value that was added "
        "because a best value was at an edge, for all groups of the same command. The note names values that only "
        "other groups of the same tuning were tried at. The results are from other seeds. How each axis was tuned: "
        + " ".join(dict.fromkeys(sections))
    ]
    return Table("tuning", "Tuning", columns, rows, records, notes)


def unequal_tunings(tunings: Sequence[GroupTuning]) -> list[LeftOut]:
    """List the groups that were not tried at a value of their tuned axis that other groups were tried at.

    Arms that are run by commands of their own are widened alone. Groups of different sections `tune`, such as with
    other metrics, are not compared: the report has the section as an axis.
    """
    several = len({tuning.ablation for tuning in tunings}) > 1
    return [
        LeftOut(
            ", ".join(
                [*([tuning.ablation] if several else []), *(f"{name}={value}" for name, value in tuning.axes.items())]
            ),
            "unequal tuning",
            f"{tuning.axis}: {untried}",
        )
        for tuning in tunings
        if (untried := _untried(tuning, tunings))
    ]


def _untried(tuning: GroupTuning, tunings: Sequence[GroupTuning]) -> str:
    """Return a note of the values that only other groups of the same section were tried at. Empty: there are none."""
    values = {value for each in tunings if each.section == tuning.section for value in each.scores}
    missing = sorted(values - tuning.scores.keys(), key=float)
    return f"not tried at {', '.join(f'{float(value):g}' for value in missing)} as other groups were" if missing else ""


def _score(tuning: GroupTuning, value: Value) -> Cell:
    mean = _mean(tuning, value)
    if mean is None:
        return Cell(NO_VALUE)
    marks = "+" * (value in tuning.added) + "*" * (value == tuning.value)
    return Cell(f"{marks} {number_cell(mean).text}".strip(), mean)


def _mean(tuning: GroupTuning, value: Value) -> float | None:
    scores = [score for score in tuning.scores.get(value, {}).values() if score is not None]
    return fmean(scores) if scores and len(scores) == len(tuning.scores[value]) else None


def _records(tuning: GroupTuning, note: str, axes: Sequence[str], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        make_record(
            {axis: tuning.axes.get(axis) for axis in axes},
            {
                **names,
                "tuned": tuning.axis,
                "value": value,
                "seed": seed,
                "metric": tuning.by,
                "score": score,
                "mean": _mean(tuning, value),
                "is_chosen": value == tuning.value,
                "is_added": value in tuning.added,
                "note": note,
            },
        )
        for value, scores in tuning.scores.items()
        for seed, score in scores.items()
    ]
