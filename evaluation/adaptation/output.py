"""Table and plot of adapted models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lpc_lightning.evaluation.accuracy.scored_pairs import ONE_PROMPT
from lpc_lightning.evaluation.adaptation.inference import OWN_MAJORITY
from lpc_lightning.evaluation.adaptation.pairs import NO_MAJORITY, OTHERS_MAJORITY, AdaptationReport
from lpc_lightning.evaluation.adaptation.plots import TITLE, draw_adaptation, score_estimate, score_line, to_shots
from lpc_lightning.evaluation.adaptation.policy import UNDER_Z
from lpc_lightning.evaluation.adaptation.scores import Score
from lpc_lightning.evaluation.figures import Plot, write_plots
from lpc_lightning.evaluation.line_panels import Line, describe_lines
from lpc_lightning.evaluation.tables import score
from lpc_lightning.files.json_files import write_text
from lpc_lightning.files.markdown import markdown_table

ROW_NAMES = {
    f"exact{UNDER_Z}": "exact, under z",
    f"amortized{UNDER_Z}": "amortized, under z",
    OWN_MAJORITY: "own majority label",
    "prior": "prior, any annotator",
    "no_latent": "no latent (z = 0)",
    OTHERS_MAJORITY: "others' majority label",
}
TABLE = "adaptation.md"


def write_reports(
    folder: Path, reports: Mapping[str, AdaptationReport], shots: Sequence[int], overlaps: Sequence[str]
) -> str:
    """Write `adaptation.md` and the plot, and return the text.

    Args:
        folder: An existing folder.
        reports: Results by name of the model.
        shots: Numbers of labelled pairs.
        overlaps: Sentences on pairs that are training pairs.
    """
    sentences = [*left_out(reports, shots), *overlaps]
    text = "\n".join([table(reports, shots), *(f"\n{sentence}" for sentence in sentences)])
    write_text(folder / TABLE, text + "\n")
    lines = panels(reports)
    figure = draw_adaptation(lines, sorted(set(shots)), None, "accuracy")
    plot = Plot("adaptation", TITLE, figure, describe_lines(TITLE, lines, to_shots), "Bands: 95 % over prompts.")
    list(write_plots(folder, [plot]))
    return text


def table(reports: Mapping[str, AdaptationReport], shots: Sequence[int]) -> str:
    """Format accuracies with standard errors: a row for each model and inference, a column for each number of shots."""
    numbers = sorted({0, *shots})  # levels are in the column of 0
    rows = []
    for name, report in reports.items():
        for inference, scores in _curves(report).items():
            cells = [score(entry.accuracy, entry.standard_error) if (entry := scores.get(n)) else "-" for n in numbers]
            rows.append([name, ROW_NAMES.get(inference, inference), *cells])
        for baseline, entry in report.baselines.items():
            scores = {0: entry, **(_without_codes(report) if baseline == "prior" else {})}
            cells = [score(each.accuracy, each.standard_error) if (each := scores.get(n)) else "-" for n in numbers]
            rows.append([name, ROW_NAMES[baseline], *cells])
    return markdown_table(["model", "codes by", *(f"given {n}" for n in numbers)], rows, left=2)


def left_out(reports: Mapping[str, AdaptationReport], shots: Sequence[int]) -> list[str]:
    """Return a sentence for each number of shots at which annotators have too few pairs, and those on missing numbers.

    Models with the same counts share a sentence.
    """
    models: dict[str, list[str]] = {}
    for name, report in reports.items():
        for n in sorted(set(shots)):
            if too_few := report.too_few(n):
                total = sum(report.annotators.values())
                others = "other" if report.labelled is None else "labelled"
                reason = f"annotators left out for having fewer than {n} {others} pairs: {len(too_few)}."
                models.setdefault(f"given {n}: {total - sum(too_few)} of {total} pairs, {reason}", []).append(name)
        if not report.has_majority:
            models.setdefault(NO_MAJORITY, []).append(name)
        if report.baselines["prior"].prompts == 1:
            models.setdefault(ONE_PROMPT, []).append(name)
    return [f"{', '.join(names)}, {sentence}" for sentence, names in models.items()]


def panels(reports: Mapping[str, AdaptationReport]) -> dict[str, list[Line]]:
    """Return the lines of the plot by the panel's title.

    One model has a single panel with all its curves and the level at z = 0. Several models have a panel for each
    inference, with a line for each model.
    """
    if len(reports) == 1:
        (report,) = reports.values()
        curves = [score_line(ROW_NAMES.get(name, name), scores) for name, scores in _curves(report).items()]
        return {"": [*curves, _level(ROW_NAMES["no_latent"], report.baselines["no_latent"])]}
    inferences = dict.fromkeys(name for report in reports.values() for name in _curves(report))
    return {
        ROW_NAMES.get(inference, inference): [
            score_line(name, _without_codes(report) or _curves(report)[inference])
            for name, report in reports.items()
            if not report.mixtures or inference in _curves(report)
        ]
        for inference in inferences
    }


def _without_codes(report: AdaptationReport) -> Mapping[int, Score]:
    """Return the scores of a policy that cannot adapt, on the pairs of the annotators with enough labels. Else none."""
    return {} if report.mixtures else report.scores["exact"]


def _curves(report: AdaptationReport) -> Mapping[str, Mapping[int, Score]]:
    """Return the scores by inference, or none for a policy that cannot adapt."""
    if not report.mixtures:
        return {}
    return {name: scores for name, scores in report.scores.items() if name != "exact" or report.weights}


def _level(label: str, score: Score) -> Line:
    return Line(label, (), (), level=score_estimate(score))
