"""Differences between each group of runs and its baseline, seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.comparison.comparison import SIGNIFICANCE
from lpc_lightning.evaluation.report.runs.pairs import PromptScores, prompt_scores
from lpc_lightning.evaluation.report.runs.records import RunRecord
from lpc_lightning.evaluation.report.runs.settings import Value, as_setting
from lpc_lightning.evaluation.report.study import Group, LeftOut, Study, seed_or_folder, shared_by
from lpc_lightning.evaluation.statistics.seeds import SeedDifference, paired_difference
from lpc_lightning.evaluation.statistics.significance import holm

MIN_SEEDS = 5
"""Fewest seeds of a difference that may be called significant. With two, equal differences by chance pass a t-test."""
DEFAULT_BASELINE = {"latent": "none"}
"""Baseline if none is given and such runs exist."""


@dataclass(frozen=True)
class Contrast:
    """A group compared with its baseline in one metric."""

    group: Group
    baseline: Group
    metric: str
    difference: SeedDifference | None
    """None: the two groups have no seed in common."""
    unpaired: tuple[str, ...]
    """Seeds that only one of the two groups has."""
    p_corrected: float | None = None
    """p-value of the t-test, corrected by Holm for all contrasts of the report."""

    @property
    def is_significant(self) -> bool:
        """True if the corrected p-value is below `SIGNIFICANCE`, over at least `MIN_SEEDS` seeds."""
        if self.difference is None or self.p_corrected is None:
            return False
        return self.p_corrected < SIGNIFICANCE and self.difference.estimate.n >= MIN_SEEDS


def read_baseline(study: Study, texts: Sequence[str] | None) -> dict[str, Value]:
    """Read the baseline's axes and values.

    Args:
        study: The groups to compare.
        texts: `AXIS=VALUE`, one or several. None: `DEFAULT_BASELINE`, if there are such runs.

    Returns:
        Values by axis. Empty: no baseline.

    Raises:
        ConfigError: There is no such axis or value, an axis has two values, or no run has all the values.
    """
    if texts is None:
        available = all(value in study.axes.get(axis, ()) for axis, value in DEFAULT_BASELINE.items())
        return dict[str, Value](DEFAULT_BASELINE) if available else {}
    values = "; ".join(f"{axis} = {', '.join(map(str, values))}" for axis, values in study.axes.items())
    expected = f"expected AXIS=VALUE of {values}." if values else "but the runs differ only in the seed."
    baseline: dict[str, Value] = {}
    for text in texts:
        axis, _, value = text.partition("=")
        own_values = study.axes.get(axis, ())
        # A text such as 1.0, which is a share, is not the number.
        parsed = next((each for each in own_values if str(each) == value), as_setting(axis, value))
        if parsed not in own_values:
            raise ConfigError(f"baseline: found {text!r}, {expected}")
        if axis in baseline:
            raise ConfigError(
                f"baseline: found {axis}={baseline[axis]} and {text}, expected one value of {axis}: all groups are "
                "compared with the same one. Make a report for each."
            )
        baseline[axis] = parsed
    if not any(_matches(group, baseline) for group in study.groups):
        raise ConfigError(f"baseline: found no run with {' and '.join(texts)}, {expected}")
    return baseline


def contrasts(
    study: Study, metrics: Sequence[str], baseline: Mapping[str, Value]
) -> tuple[list[Contrast], list[LeftOut]]:
    """Compare every group with the group that has the baseline's values and the same values on all other axes.

    An axis that does not apply to the baseline is ignored, such as the number of codes. A metric that no baseline run
    has logged is ignored, too: the table of means lists it as missing.

    Args:
        study: The groups to compare.
        metrics: Metrics to compare.
        baseline: Values by axis, from `read_baseline`. Empty: compare nothing.

    Returns:
        The contrasts, sorted by metric, and the groups without a baseline.
    """
    compared, unmatched = list[Contrast](), list[LeftOut]()
    baselines = [group for group in study.groups if _matches(group, baseline)]
    metrics = [metric for metric in metrics if any(group.values(metric) for group in baselines)]
    for group in study.groups if baseline else ():
        if _matches(group, baseline):
            continue
        partner = _find_baseline(study, group, baseline)
        if partner is None:
            settings = ", ".join(f"{axis}={value}" for axis, value in {**group.axes, **baseline}.items())
            unmatched.append(LeftOut(study.label(group), "no baseline", f"no runs of {settings}"))
            continue
        compared += [_contrast(group, partner, metric) for metric in metrics]
    compared.sort(key=lambda contrast: metrics.index(contrast.metric))
    p_values = [contrast.difference.p_value for contrast in compared if contrast.difference]
    corrected = iter(holm([p_value for p_value in p_values if p_value is not None]))
    return [
        replace(contrast, p_corrected=next(corrected))
        if contrast.difference and contrast.difference.p_value is not None
        else contrast
        for contrast in compared
    ], unmatched


def _matches(group: Group, values: Mapping[str, Value]) -> bool:
    return all(group.axes.get(axis) == value for axis, value in values.items())


def _find_baseline(study: Study, group: Group, baseline: Mapping[str, Value]) -> Group | None:
    others = [axis for axis in study.axes if axis not in baseline]
    candidates = [
        candidate
        for candidate in study.groups
        if _matches(candidate, baseline)
        and all(axis not in candidate.axes or candidate.axes[axis] == group.axes.get(axis) for axis in others)
    ]
    return max(candidates, key=lambda candidate: sum(axis in candidate.axes for axis in others), default=None)


def _contrast(group: Group, baseline: Group, metric: str) -> Contrast:
    runs, baseline_runs = _by_seed(group, metric), _by_seed(baseline, metric)
    seeds = [seed for seed in runs if seed in baseline_runs]
    difference = None
    if seeds:
        values, baseline_values = ([each[seed].metrics[metric] for seed in seeds] for each in (runs, baseline_runs))
        by_prompt = [_prompt_differences(runs[seed], baseline_runs[seed], metric) for seed in seeds]
        difference = paired_difference(baseline_values, values, shared_by(by_prompt))
    unpaired = sorted(set(runs) ^ set(baseline_runs))
    return Contrast(group, baseline, metric, difference, tuple(unpaired))


def _prompt_differences(run: RunRecord, baseline: RunRecord, metric: str) -> PromptScores:
    """Return the prompts behind the difference of two runs, and what each of them adds to it."""
    ours, theirs = prompt_scores(run, metric), prompt_scores(baseline, metric)
    prompts = None if ours.prompts is None or theirs.prompts is None else ours.prompts | theirs.prompts
    if ours.added is None or theirs.added is None:
        return PromptScores(prompts)
    return PromptScores(prompts, ours.added.minus(theirs.added))


def _by_seed(group: Group, metric: str) -> dict[str, RunRecord]:
    """Return the runs with the metric by seed. Runs without a seed can be paired only if the group has a single run."""
    values = group.values(metric)
    if len(values) == 1 and values[0][0].seed is None:
        return {"none": values[0][0]}
    return {seed_or_folder(record): record for record, _ in values}
