"""A report's plots of annotator adaptation, for runs with `lpc_lightning.callbacks.AnnotatorAdaptation`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lpc_lightning.evaluation.adaptation.inference import INFERENCES
from lpc_lightning.evaluation.adaptation.plots import TITLE, draw_adaptation, to_position, to_shots
from lpc_lightning.evaluation.figures import NoPlot, Plot
from lpc_lightning.evaluation.line_panels import Line, describe_cut, describe_lines
from lpc_lightning.evaluation.report.line_plots import BAND, spread_panels
from lpc_lightning.evaluation.report.study import Group, Study
from lpc_lightning.evaluation.report.subject import Drawn, Subject, file_name

STAGES = ("val", "test")


def annotator_adaptation(subject: Subject) -> Drawn:
    """Plot each inference in validation and in test: a line for each group, or a level for a policy without codes."""
    plots = [
        _plot(subject.study, stage, inference, shots)
        for stage in STAGES
        for inference in INFERENCES
        if len(shots := _logged_shots(subject.study, stage, inference)) > 1
    ]
    if not plots:
        yield NoPlot(TITLE, "no finished run has logged adaptation/exact at two numbers of labelled pairs or more")
    yield from plots


def _logged_shots(study: Study, stage: str, inference: str) -> list[int]:
    pattern = re.compile(rf"{stage}/adaptation/{inference}/(\d+)")
    return sorted(int(match[1]) for name in study.metrics if (match := pattern.fullmatch(name)))


def _plot(study: Study, stage: str, inference: str, shots: Sequence[int]) -> Plot:
    title = f"{TITLE}: {inference}, {stage}"
    family = f"{stage}/adaptation"
    panels = spread_panels(
        study, study.groups, (), lambda label, groups: _line(label, groups[0], family, inference, shots)
    )
    ceilings = [mean.mean for group in study.groups if (mean := group.estimate(f"{family}/ceiling"))]
    figure = draw_adaptation(panels, shots, max(ceilings, default=None), f"{family}/{inference}")
    caption = (
        f"Mean over seeds. {BAND} A policy without codes has nothing to infer and is constant. With 0 labelled pairs, "
        "the weights of the codes are the prior. Dotted: the best accuracy that is possible given the annotator, if "
        f"the data gives it.{describe_cut(panels)}"
    )
    name = file_name(f"{family}/{inference}")
    return Plot(name, title, figure, describe_lines(title, panels, to_shots), caption)


def _line(label: str, group: Group, family: str, inference: str, shots: Sequence[int]) -> Line | None:
    means = {n: mean for n in shots if (mean := group.estimate(f"{family}/{inference}/{n}")) is not None}
    return Line(label, [to_position(n) for n in means], list(means.values())) if means else None
