"""Each group of runs against its baseline, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.report.runs.settings import Value, as_value
from lpc_lightning.evaluation.report.study import Group, LeftOut, Study
from lpc_lightning.evaluation.statistics.seeds import SeedDifference, paired_difference
from lpc_lightning.evaluation.statistics.significance import holm

PLAIN = {"latent": "none"}
"""The baseline where none is asked for, and there are such runs."""


@dataclass(frozen=True)
class Contrast:
    """A group against its baseline in one metric."""

    group: Group
    baseline: Group
    metric: str
    difference: SeedDifference | None
    """None: no seed is in both."""
    unpaired: tuple[str, ...]
    """Seeds of one side that the other lacks."""
    p_corrected: float | None = None
    """The t-test's p-value, corrected by Holm for all contrasts of the report."""


def read_baseline(study: Study, asked: Sequence[str] | None) -> dict[str, Value]:
    """The baseline's axes and values out of `AXIS=VALUE` texts; those of `PLAIN` where none are asked for.

    Returns:
        Nothing where none is asked for and no run is plain.

    Raises:
        ConfigError: No such axis or value, or nothing to compare with it.
    """
    if asked is None:
        here = all(value in study.axes.get(axis, ()) for axis, value in PLAIN.items())
        return dict[str, Value](PLAIN) if here else {}
    known = "; ".join(f"{axis} = {', '.join(map(str, values))}" for axis, values in study.axes.items())
    expected = f"expected AXIS=VALUE of {known}." if known else "but the runs differ in nothing but the seed."
    baseline: dict[str, Value] = {}
    for text in asked:
        axis, _, value = text.partition("=")
        if as_value(value) not in study.axes.get(axis, ()):
            raise ConfigError(f"baseline: found {text!r}, {expected}")
        baseline[axis] = as_value(value)
    if not any(_is(group, baseline) for group in study.groups):
        raise ConfigError(f"baseline: no run has {' and '.join(asked)}, {expected}")
    return baseline


def contrasts(
    study: Study, metrics: Sequence[str], baseline: Mapping[str, Value]
) -> tuple[list[Contrast], list[LeftOut]]:
    """Every group against the group that has the baseline's values, and the same values on all other axes.

    Where an axis does not apply to the baseline (the codes of no latent), it does not count. Nor do metrics that no run
    of a baseline has logged (what the codes know); that those lack them is told of the means.

    Returns:
        The contrasts, metric by metric, and the groups that have no baseline.
    """
    found, alone = list[Contrast](), list[LeftOut]()
    plain = [group for group in study.groups if _is(group, baseline)]
    metrics = [metric for metric in metrics if any(group.values(metric) for group in plain)]
    for group in study.groups if baseline else ():
        if _is(group, baseline):
            continue
        partner = _partner(study, group, baseline)
        if partner is None:
            wanted = ", ".join(f"{axis}={value}" for axis, value in {**group.axes, **baseline}.items())
            alone.append(LeftOut(study.label(group), "no baseline", f"no runs of {wanted}"))
            continue
        found += [_contrast(group, partner, metric) for metric in metrics]
    found.sort(key=lambda each: metrics.index(each.metric))
    tested = [each.difference.p_value for each in found if each.difference]
    corrected = iter(holm([p_value for p_value in tested if p_value is not None]))
    whole = [
        replace(each, p_corrected=next(corrected)) if each.difference and each.difference.p_value is not None else each
        for each in found
    ]
    return whole, alone


def _is(group: Group, values: Mapping[str, Value]) -> bool:
    return all(group.axes.get(axis) == value for axis, value in values.items())


def _partner(study: Study, group: Group, baseline: Mapping[str, Value]) -> Group | None:
    others = [axis for axis in study.axes if axis not in baseline]
    fitting = [
        each
        for each in study.groups
        if _is(each, baseline)
        and all(axis not in each.axes or each.axes[axis] == group.axes.get(axis) for axis in others)
    ]
    return max(fitting, key=lambda each: sum(axis in each.axes for axis in others), default=None)


def _contrast(group: Group, baseline: Group, metric: str) -> Contrast:
    ours, theirs = (_by_seed(each, metric) for each in (group, baseline))
    shared = [seed for seed in ours if seed in theirs]
    difference = (
        paired_difference([theirs[seed] for seed in shared], [ours[seed] for seed in shared]) if shared else None
    )
    lone = sorted(set(ours) ^ set(theirs))
    return Contrast(group, baseline, metric, difference, tuple(lone))


def _by_seed(group: Group, metric: str) -> dict[str, float]:
    """The metric by seed. Several runs without a seed have nothing to be paired by; a single one is the group's."""
    values = group.values(metric)
    if len(values) == 1 and values[0][0].seed is None:
        return {"none": values[0][1]}
    return {str(each.seed) if each.seed is not None else f"none ({each.name})": value for each, value in values}
