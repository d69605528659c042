"""Comparison of several models: scores with standard errors, and the significance of differences to the baseline."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from lpc_lightning.evaluation.benchmarks.results import to_json_value
from lpc_lightning.evaluation.comparison.model_scores import Measure, ModelScores
from lpc_lightning.evaluation.statistics.significance import PairedTest, holm, paired_test
from lpc_lightning.evaluation.tables import p_value, score
from lpc_lightning.files.csv_files import write_csv
from lpc_lightning.files.json_files import write_json, write_text
from lpc_lightning.files.markdown import markdown_table

SIGNIFICANCE = 0.05
"""Significance level. Differences with a corrected p-value below it get a star."""
TEST_NAMES = tuple(field.name for field in fields(PairedTest))
NAMES = (*Measure._fields, "model", "baseline", "value", "stderr", *TEST_NAMES, "p_corrected", "note", "results")
"""Columns of the CSV file."""


class Caveat(NamedTuple):
    """Difference between the evaluations of a model and of the baseline."""

    text: str
    """`evaluated in bfloat16, and base in float32`."""
    effect: str
    """What the difference of the scores includes."""


@dataclass(frozen=True)
class Cell:
    """One measure of one model."""

    measure: Measure
    model: str
    value: float | None
    """The score. None: the model was not evaluated on this measure."""
    stderr: float | None
    test: PairedTest | None = None
    """Test against the baseline. None for the baseline itself, and if `note` has a reason against a test."""
    p_corrected: float | None = None
    """The test's p-value, corrected by Holm for all tests of the comparison."""
    note: str = ""
    """Reason for a missing test, or the caveats about the test."""
    caveats: tuple[Caveat, ...] = ()
    """Caveats about the test."""

    @property
    def is_significant(self) -> bool:
        """True if the difference is significant after the correction."""
        return self.p_corrected is not None and self.p_corrected < SIGNIFICANCE


@dataclass(frozen=True)
class Comparison:
    """All measures of all models. The first model is the baseline."""

    models: tuple[str, ...]
    cells: tuple[Cell, ...]
    """Cells sorted by measure, then by model, in the order of `models`."""
    remarks: tuple[str, ...] = ()
    """Sentences on single models, below the tables."""
    folders: tuple[str, ...] = ()
    """Folder of each model's results, as a path from the folder of the comparison."""

    def rows(self) -> Iterator[tuple[Measure, list[Cell]]]:
        """Yield each measure with its cells, one per model."""
        for start in range(0, len(self.cells), len(self.models)):
            cells = list(self.cells[start : start + len(self.models)])
            yield cells[0].measure, cells


def compare(models: Sequence[ModelScores]) -> Comparison:
    """Compare models, and test each against the first.

    Two scores are tested only if they are comparable. If task version, few-shot examples, items or other conditions
    differ, the model has a score and a note, and no test. If only the precision or the template of the prompts differs,
    there is a test with a note.

    Args:
        models: At least one model, with distinct names. The first is the baseline.
    """
    baseline = models[0]
    measures = dict.fromkeys(measure for model in models for measure in model.scores)
    cells = [_cell(measure, model, baseline) for measure in measures for model in models]
    corrected = iter(holm([cell.test.p_value for cell in cells if cell.test]))
    corrected_cells = [replace(cell, p_corrected=next(corrected)) if cell.test else cell for cell in cells]
    remarks = tuple(f"{model.name}, {remark}" for model in models for remark in model.remarks)
    names, folders = tuple(model.name for model in models), tuple(model.folder for model in models)
    return Comparison(names, tuple(corrected_cells), remarks, folders)


def _cell(measure: Measure, model: ModelScores, baseline: ModelScores) -> Cell:
    stderr = model.stderrs.get(measure)
    value = model.scores.get(measure)
    note = "" if model is baseline else _reason_against_test(measure, model, baseline)
    if model is baseline or note:
        return Cell(measure, model.name, value, stderr, note=note)
    baseline_items, model_items = baseline.items[measure], model.items[measure]
    test = paired_test(
        list(baseline_items.values()),
        [model_items[item] for item in baseline_items],
        clusters=[baseline.prompts.get(item, str(item)) for item in baseline_items],
    )
    caveats = tuple(_caveats(measure, model, baseline))
    return Cell(measure, model.name, value, stderr, test, note="; ".join(text for text, _ in caveats), caveats=caveats)


def _reason_against_test(measure: Measure, model: ModelScores, baseline: ModelScores) -> str:
    """Return why the two scores cannot be tested, or an empty string if they can."""
    for scores in (model, baseline):
        if measure not in scores.scores:
            return f"{scores.name} was not evaluated"
    expected, found = (scores.conditions.get(measure.task, {}) for scores in (baseline, model))
    for name in dict.fromkeys([*expected, *found]):
        if expected.get(name) != found.get(name):
            return f"not comparable: {name} is {found.get(name)}, but {expected.get(name)} for {baseline.name}"
    if measure not in baseline.items or measure not in model.items:
        return "no test: the score is not a mean of stored item scores"
    shared = len(baseline.items[measure].keys() & model.items[measure].keys())
    total = len(model.items[measure].keys() | baseline.items[measure].keys())
    if shared < total:
        return f"not comparable: only {shared} of {total} items are the same"
    prompts = {baseline.prompts.get(item, str(item)) for item in baseline.items[measure]}
    return "" if len(prompts) > 1 else "no test: there is one prompt"


def _caveats(measure: Measure, model: ModelScores, baseline: ModelScores) -> Iterator[Caveat]:
    """Yield what else differs between the two evaluations."""
    first, second = baseline.precision, model.precision
    if first and second and first != second:
        yield Caveat(f"evaluated in {second}, and {baseline.name} in {first}", "rounding errors")
    first, second = (scores.templates.get(measure.task) for scores in (baseline, model))
    if first and second and first != second:
        yield Caveat(f"evaluated on {measure.task} with another template than {baseline.name}", "the template's")


def to_markdown(comparison: Comparison) -> str:
    """Format a comparison as Markdown: the scores, with a star at significant differences, and the tests below."""
    scores = [[measure.task, measure.metric, *(_score(cell) for cell in cells)] for measure, cells in comparison.rows()]
    parts = [markdown_table(["task", "metric", *comparison.models], scores, left=2)]
    if tested := [_difference(cell) for cell in comparison.cells if cell.test]:
        parts.append(
            f"Score ± standard error. Below: differences to {comparison.models[0]}, with 95 % intervals. p: McNemar's "
            "exact test if all items score 0 or 1,\nelse sign flips of items, or of whole prompts where pairs share "
            f"one. Holm: corrected for all tests shown. *: Holm below {SIGNIFICANCE}."
        )
        header = ["task", "metric", "model", "difference", "95 % interval", "p", "Holm", "items"]
        parts.append(markdown_table(header, tested, left=3))
        caveats = dict.fromkeys((cell.model, caveat) for cell in comparison.cells for caveat in cell.caveats)
        parts += [f"{name} was {text}: its differences include {effect}." for name, (text, effect) in caveats]
    untested: dict[tuple[str, str, str], list[str]] = {}
    for cell in comparison.cells:
        if cell.note and not cell.test and cell.value is not None:
            untested.setdefault((cell.measure.task, cell.model, cell.note), []).append(cell.measure.metric)
    if untested:
        rows = [[task, model, note, ", ".join(metrics)] for (task, model, note), metrics in untested.items()]
        parts.append(markdown_table(["task", "model", "not compared", "metrics"], rows, left=4))
    return "\n\n".join([*parts, *comparison.remarks])


def _score(cell: Cell) -> str:
    return "-" if cell.value is None else score(cell.value, cell.stderr) + (" *" if cell.is_significant else "")


def _difference(cell: Cell) -> list[str]:
    test, corrected = cell.test, cell.p_corrected
    assert test is not None
    assert corrected is not None
    labels = [cell.measure.task, cell.measure.metric, cell.model]
    interval = f"[{test.low:+.4f}, {test.high:+.4f}]"
    return [*labels, f"{test.difference:+.4f}", interval, p_value(test.p_value), p_value(corrected), str(test.items)]


def to_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return one flat dictionary per measure and model. Missing values are None."""
    no_test = dict.fromkeys(TEST_NAMES)
    folders = dict(zip(comparison.models, comparison.folders, strict=True))
    return [
        {
            **cell.measure._asdict(),
            "model": cell.model,
            "baseline": comparison.models[0],
            "value": cell.value,
            "stderr": cell.stderr,
            **(asdict(cell.test) if cell.test else no_test),
            "p_corrected": cell.p_corrected,
            "note": cell.note,
            "results": folders[cell.model],
        }
        for cell in comparison.cells
    ]


def holds_no_other_results(path: Path, models: Sequence[ModelScores]) -> bool:
    """Return True if a JSON file compares results of some of these models and folders, or if there is no file."""
    ours = {(model.name, model.folder) for model in models}
    try:
        return {(row["model"], row["results"]) for row in json.loads(path.read_text(encoding="utf-8"))} <= ours
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_comparison(folder: Path, comparison: Comparison, name: str = "comparison") -> None:
    """Write `comparison.md`, `comparison.csv` and `comparison.json` into an existing folder, or under another name."""
    rows = to_rows(comparison)
    write_text(folder / f"{name}.md", to_markdown(comparison) + "\n")
    write_json(folder / f"{name}.json", to_json_value(rows))
    write_csv(folder / f"{name}.csv", rows, NAMES)
