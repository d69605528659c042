"""Several models in one table: scores with standard errors, and the significance of each difference to the baseline."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lpc_lightning.evaluation.comparison.model_scores import Measure, ModelScores
from lpc_lightning.evaluation.statistics.significance import PairedTest, holm, paired_test
from lpc_lightning.evaluation.tables import markdown_table, p_value, score

LEVEL = 0.05
"""A corrected p-value below this gets a star."""


@dataclass(frozen=True)
class Cell:
    """One measure of one model."""

    measure: Measure
    model: str
    value: float | None
    """None: this model was not measured."""
    stderr: float | None
    test: PairedTest | None = None
    """Against the baseline. None for the baseline itself, and where `note` says why there is none."""
    p_corrected: float | None = None
    """The test's p-value, corrected by Holm for all tests of the comparison."""
    note: str = ""
    """Why there is no test, or what is to be kept in mind of the one there is."""

    @property
    def stands_out(self) -> bool:
        """Whether the difference is significant after the correction."""
        return self.p_corrected is not None and self.p_corrected < LEVEL


@dataclass(frozen=True)
class Comparison:
    """Every measure of every model; the first model is the baseline."""

    models: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Measure by measure, and in each the models in their order."""

    def rows(self) -> Iterator[tuple[Measure, list[Cell]]]:
        """Each measure with its cells, one a model."""
        for start in range(0, len(self.cells), len(self.models)):
            cells = list(self.cells[start : start + len(self.models)])
            yield cells[0].measure, cells


def compare(models: Sequence[ModelScores], seed: int = 0) -> Comparison:
    """Put models side by side and test each against the first.

    Only like is tested against like: a model whose task ran in another version, with other few-shot examples, on other
    items and so on gets its score and a note in place of a test. One that was evaluated in another precision is tested,
    with a note.

    Args:
        models: At least one; their names differ. The first is the baseline.
        seed: Seed of the bootstrap.
    """
    baseline = models[0]
    measures = dict.fromkeys(measure for model in models for measure in model.scores)
    cells = [_cell(measure, model, baseline, seed) for measure in measures for model in models]
    corrected = iter(holm([cell.test.p_value for cell in cells if cell.test]))
    corrected_cells = [replace(cell, p_corrected=next(corrected)) if cell.test else cell for cell in cells]
    return Comparison(tuple(model.name for model in models), tuple(corrected_cells))


def _cell(measure: Measure, model: ModelScores, baseline: ModelScores, seed: int) -> Cell:
    stderr = model.stderrs.get(measure)
    value = model.scores.get(measure)
    note = "" if model is baseline else _obstacle(measure, model, baseline)
    if model is baseline or note:
        return Cell(measure, model.name, value, stderr, note=note)
    ours, theirs = baseline.items[measure], model.items[measure]
    test = paired_test([ours[item] for item in ours], [theirs[item] for item in ours], seed)
    return Cell(measure, model.name, value, stderr, test, note=_reservation(model, baseline))


def _obstacle(measure: Measure, model: ModelScores, baseline: ModelScores) -> str:
    """Why the two cannot be compared, or nothing."""
    for each in (model, baseline):
        if measure not in each.scores:
            return f"{each.name} was not measured"
    ours, theirs = (each.conditions.get(measure.task, {}) for each in (baseline, model))
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            return f"unlike: {name} is {theirs.get(name)}, and {ours.get(name)} for {baseline.name}"
    if measure not in baseline.items or measure not in model.items:
        return "no test: there are no scores of single items whose mean it is"
    shared = len(baseline.items[measure].keys() & model.items[measure].keys())
    found = len(model.items[measure].keys() | baseline.items[measure].keys())
    if shared < found:
        return f"unlike: only {shared} of {found} items are the same"
    return "" if shared > 1 else "no test: there is one item"


def _reservation(model: ModelScores, baseline: ModelScores) -> str:
    """What else than the models may be in their difference, or nothing."""
    ours, theirs = baseline.precision, model.precision
    return f"evaluated in {theirs}, and {baseline.name} in {ours}" if ours and theirs and ours != theirs else ""


def to_markdown(comparison: Comparison) -> str:
    """The scores, a star where a difference stands out, and below them what is known of each difference."""
    scores = [[measure.task, measure.metric, *(_score(cell) for cell in cells)] for measure, cells in comparison.rows()]
    parts = [markdown_table(["task", "metric", *comparison.models], scores, left=2)]
    if tested := [_difference(cell) for cell in comparison.cells if cell.test]:
        parts.append(
            f"Score ± standard error. Below: differences to {comparison.models[0]}, with 95 % intervals. p: McNemar's "
            "exact test where items score 0 or 1,\na paired bootstrap elsewhere; Holm: corrected for all tests shown. "
            f"*: Holm below {LEVEL}."
        )
        header = ["task", "metric", "model", "difference", "95 % interval", "p", "Holm", "items"]
        parts.append(markdown_table(header, tested, left=3))
        notes = dict.fromkeys(f"{cell.model} was {cell.note}" for cell in comparison.cells if cell.test and cell.note)
        parts += [f"{note}: its differences hold rounding, too." for note in notes]
    untested: dict[tuple[str, str, str], list[str]] = {}
    for cell in comparison.cells:
        if cell.note and not cell.test and cell.value is not None:
            untested.setdefault((cell.measure.task, cell.model, cell.note), []).append(cell.measure.metric)
    if untested:
        rows = [[task, model, note, ", ".join(metrics)] for (task, model, note), metrics in untested.items()]
        parts.append(markdown_table(["task", "model", "not compared", "metrics"], rows, left=4))
    return "\n\n".join(parts)


def _score(cell: Cell) -> str:
    return "-" if cell.value is None else score(cell.value, cell.stderr) + (" *" if cell.stands_out else "")


def _difference(cell: Cell) -> list[str]:
    test, corrected = cell.test, cell.p_corrected
    assert test is not None
    assert corrected is not None
    where = [cell.measure.task, cell.measure.metric, cell.model]
    interval = f"[{test.low:+.4f}, {test.high:+.4f}]"
    return [*where, f"{test.difference:+.4f}", interval, p_value(test.p_value), p_value(corrected), str(test.items)]


def to_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat entry for each measure of each model; what is not known is None."""
    unknown = dict.fromkeys(each.name for each in fields(PairedTest))
    return [
        {
            **cell.measure._asdict(),
            "model": cell.model,
            "baseline": comparison.models[0],
            "value": cell.value,
            "stderr": cell.stderr,
            **(asdict(cell.test) if cell.test else unknown),
            "p_corrected": cell.p_corrected,
            "note": cell.note,
        }
        for cell in comparison.cells
    ]


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write `comparison.md`, `comparison.csv` and `comparison.json` into a folder that is there."""
    rows = to_rows(comparison)
    (folder / "comparison.md").write_text(to_markdown(comparison) + "\n", encoding="utf-8")
    (folder / "comparison.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    with (folder / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else [])
        table.writeheader()
        table.writerows(rows)
