"""A report's plots of few-shot annotators, where runs have `lpc_lightning.callbacks.AnnotatorAdaptation`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lpc_lightning.evaluation.adaptation.inference import INFERENCES
from lpc_lightning.evaluation.adaptation.plots import draw_adaptation, place_of, shots_at
from lpc_lightning.evaluation.figures import Line, NoPlot, Plot
from lpc_lightning.evaluation.report.line_plots import BAND, in_words, spread_panels, told_cut
from lpc_lightning.evaluation.report.study import Group, Study
from lpc_lightning.evaluation.report.subject import Drawn, Subject, file_name

STAGES = ("val", "test")
TITLE = "Accuracy on an annotator's pairs, given others of the same annotator"


def annotator_adaptation(subject: Subject) -> Drawn:
    """Each way of inference, in validation and in test: a line a group, and a level where there is nothing to infer."""
    found = [
        _plot(subject.study, stage, inference, shots)
        for stage in STAGES
        for inference in INFERENCES
        if len(shots := _shots(subject.study, stage, inference)) > 1
    ]
    if not found:
        yield NoPlot(TITLE, "no finished run has logged adaptation/exact at two numbers of labelled pairs or more")
    yield from found


def _shots(study: Study, stage: str, inference: str) -> list[int]:
    pattern = re.compile(rf"{stage}/adaptation/{inference}/(\d+)")
    return sorted(int(match[1]) for name in study.metrics if (match := pattern.fullmatch(name)))


def _plot(study: Study, stage: str, inference: str, shots: Sequence[int]) -> Plot:
    title = f"{TITLE}: {inference}, {stage}"
    family = f"{stage}/adaptation"
    panels = spread_panels(
        study, study.groups, (), lambda label, groups: _line(label, groups[0], family, inference, shots)
    )
    known = [mean.mean for group in study.groups if (mean := group.estimate(f"{family}/ceiling"))]
    figure = draw_adaptation(panels, shots, max(known, default=None), f"{family}/{inference}")
    caption = (
        f"Mean over seeds. {BAND} A policy without codes has nothing to infer, and stays where it is. At 0 labelled "
        "pairs the codes weigh as the prior says. Dotted: the best that can be had given the annotator, where the data "
        "knows it."
    )
    name = file_name(f"{family}/{inference}")
    return Plot(name, title, figure, in_words(title, panels, shots_at), caption + told_cut(panels))


def _line(label: str, group: Group, family: str, inference: str, shots: Sequence[int]) -> Line | None:
    found = {n: mean for n in shots if (mean := group.estimate(f"{family}/{inference}/{n}")) is not None}
    return Line(label, [place_of(n) for n in found], list(found.values())) if found else None
