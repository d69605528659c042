"""A report's plots of annotator adaptation, for runs with `lpc_lightning.callbacks.AnnotatorAdaptation`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from lpc_lightning.evaluation.adaptation.inference import INFERENCES, OWN_MAJORITY
from lpc_lightning.evaluation.adaptation.pairs import ADAPTED, OTHERS_MAJORITY, SHARE
from lpc_lightning.evaluation.adaptation.plots import TITLE, draw_adaptation, to_position, to_shots
from lpc_lightning.evaluation.adaptation.policy import UNDER_Z
from lpc_lightning.evaluation.figures import NoPlot, Plot
from lpc_lightning.evaluation.line_panels import Line, describe_cut, describe_lines
from lpc_lightning.evaluation.report.line_plots import BAND, spread_panels
from lpc_lightning.evaluation.report.study import Group, Study
from lpc_lightning.evaluation.report.subject import Drawn, Subject, file_name

STAGES = ("val", "test")
INFERENCES_DRAWN = (ADAPTED, *INFERENCES, *(f"{inference}{UNDER_Z}" for inference in INFERENCES))
DATA = "data"
"""Axis of a grid whose values have panels of their own: annotators of different data are different people."""


def annotator_adaptation(subject: Subject) -> Drawn:
    """Plot each inference in validation and in test: a line for each group, or a level for a policy without codes."""
    plots = [
        _plot(subject.study, stage, inference, shots)
        for stage in STAGES
        for inference in INFERENCES_DRAWN
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
    panels = _panels(study, family, inference, shots)
    ceilings = {mean.mean for group in study.groups if (mean := group.estimate(f"{family}/ceiling"))}
    ceiling = ceilings.pop() if len(ceilings) == 1 else None
    figure = draw_adaptation(panels, shots, ceiling, f"{family}/{inference}")
    caption = (
        f"Mean over seeds. {BAND} A policy without a latent has nothing to infer. With 0 labelled pairs, the weights "
        "of the codes are the prior. Majority labels use no policy: of the labelled pairs, and of other annotators on "
        "the same prompt. Dotted: the best accuracy that is possible given the annotator, if the data gives it and all "
        "groups have the same."
        f"{describe_cut(panels)}{_describe_shares(study, family, shots)}"
    )
    name = file_name(f"{family}/{inference}")
    return Plot(name, title, figure, describe_lines(title, panels, to_shots), caption)


def _describe_shares(study: Study, family: str, shots: Sequence[int]) -> str:
    """Return a sentence on the numbers of labelled pairs that some annotators do not have. Empty: all have them."""
    parts = []
    for n in shots:
        means = (group.estimate(f"{family}/{SHARE}/{n}") for group in study.groups)
        if shares := sorted({f"{mean.mean:.2f}" for mean in means if mean and mean.mean < 1}):
            parts.append(f"{' and '.join(shares)} at {n}")
    if not parts:
        return ""
    return (
        " Annotators with too few labels are left out: these points are of fewer annotators. Share of the pairs: "
        f"{', '.join(parts)}."
    )


def _panels(study: Study, family: str, inference: str, shots: Sequence[int]) -> dict[str, list[Line]]:
    def make(label: str, groups: Sequence[Group]) -> Line | None:
        return _line(label, groups[0], family, inference, shots)

    if DATA not in study.axes:
        panels = spread_panels(study, study.groups, (), make)
        return {title: [*lines, *_majorities(study, study.groups, family, shots)] for title, lines in panels.items()}
    members: dict[str, list[Group]] = {f"{DATA} = {value}": [] for value in study.axes[DATA]}
    for group in study.groups:
        title = f"{DATA} = {group.axes[DATA]}" if DATA in group.axes else f"no axis {DATA}"
        members.setdefault(title, []).append(group)
    by_data = {
        title: [
            *(line for group in groups if (line := make(study.label(group, DATA), [group]))),
            *_majorities(study, groups, family, shots, DATA),
        ]
        for title, groups in members.items()
    }
    return {title: lines for title, lines in by_data.items() if lines}


def _line(label: str, group: Group, family: str, inference: str, shots: Sequence[int]) -> Line | None:
    """Return the line of a group. A policy without a latent has the same accuracy under every inference."""
    has_latent = group.estimate(f"{family}/no_latent") is not None
    return _curve(label, group, f"{family}/{inference if has_latent else 'exact'}", shots)


def _curve(label: str, group: Group, name: str, shots: Sequence[int]) -> Line | None:
    means = {n: mean for n in shots if (mean := group.estimate(f"{name}/{n}")) is not None}
    return Line(label, [to_position(n) for n in means], list(means.values())) if means else None


def _majorities(study: Study, groups: Sequence[Group], family: str, shots: Sequence[int], *without: str) -> list[Line]:
    """Return the lines of labels alone. See `_distinct` for groups and labels."""

    def own(group: Group) -> Line | None:
        return _curve("own majority label", group, f"{family}/{OWN_MAJORITY}", shots)

    def others(group: Group) -> Line | None:
        level = group.estimate(f"{family}/{OTHERS_MAJORITY}")
        return None if level is None else Line("others' majority label", (), (), level=level)

    return [line for make in (own, others) for line in _distinct(study, groups, make, *without)]


def _distinct(study: Study, groups: Sequence[Group], make: Callable[[Group], Line | None], *without: str) -> list[Line]:
    """Return the lines that differ. Groups on the same pairs with the same labels share one.

    If there are several, such as under label noise, the label of each names its first group, by the axes that are not
    `without`.
    """
    lines: dict[tuple[float, ...], tuple[Group, Line]] = {}
    for group in groups:
        if (line := make(group)) is not None:
            means = line.means if line.level is None else [line.level]
            lines.setdefault((*line.positions, *(round(mean.mean, 9) for mean in means)), (group, line))
    if len(lines) < 2:
        return [line for _, line in lines.values()]
    return [replace(line, label=f"{line.label}, {study.label(group, *without)}") for group, line in lines.values()]
