"""The tuned axis of a grid: its section in the grid file, and the choice of a value for each group of cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

from lpc_lightning.errors import ConfigError
from lpc_lightning.evaluation.ablation.grids.axes import Axis, as_json, read_arguments, read_axis, to_text

KEYS = {"axis", "values", "seeds", "by", "mode", "widen", "arguments"}
"""Keys of the section `tune`."""


@dataclass(frozen=True)
class Tuning:
    """Section `tune` of a grid file.

    A group is a combination of the values of all other axes except `seed`. Each group is fitted at each value under
    each tuning seed. The value with the best mean score is used for the group's results.
    """

    axis: Axis
    """The tuned axis with its values: positive numbers in rising order. A single value is used without tuning."""
    seeds: tuple[Any, ...]
    """Seeds of the tuning cells."""
    by: str
    """Validation metric that scores a cell."""
    mode: Literal["max", "min"] = "max"
    """Whether a large or a small score is better."""
    widen: int = 2
    """Largest number of times that values are added if the best value of a group is the smallest or the largest one."""
    arguments: tuple[str, ...] = ()
    """Arguments of `fit` for all tuning cells and for no others, such as a share of an epoch."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: A value is invalid.
        """
        values = self.axis.values
        if not values or not all(_is_positive(value) for value in values) or list(values) != sorted(set(values)):
            raise ConfigError(
                f"tune.values: found {', '.join(map(to_text, values))}, expected positive numbers in rising order."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"tune.seeds: found {', '.join(map(to_text, self.seeds))}, expected at least one seed, each seed once."
            )
        if not self.by.startswith("val/"):
            raise ConfigError(
                f"tune.by: found {self.by}, expected a validation metric, such as val/rewards/accuracies."
            )
        if self.mode not in ("max", "min"):
            raise ConfigError(f"tune.mode: found {self.mode}, expected max or min.")
        if not isinstance(self.widen, int) or self.widen < 0:
            raise ConfigError(f"tune.widen: found {self.widen}, expected an integer of at least 0.")

    def with_change(self, name: str, values: Sequence[Any]) -> Tuning:
        """Return the section after a change `tune.NAME=VALUE,VALUE` from the command line.

        Raises:
            ConfigError: There is no such name, or a value is invalid.
        """
        if name == "values":
            return replace(self, axis=self.axis.with_values([_parse_number(value) for value in values]))
        if name == "seeds":
            return replace(self, seeds=tuple(values))
        if name in ("by", "mode", "widen") and len(values) == 1:
            change: dict[str, Any] = {name: values[0]}
            return replace(self, **change)
        raise ConfigError(
            f"ablate: found tune.{name}, expected values, seeds, by, mode or widen, the last three with one value."
        )

    def describe(self) -> dict[str, Any]:
        """Return the section as JSON. Grids with different sections are not tuned alike."""
        return {
            "axis": self.axis.name,
            "values": list(self.axis.values),
            "seeds": list(self.seeds),
            "by": self.by,
            "mode": self.mode,
            "widen": self.widen,
            **({"arguments": list(self.arguments)} if self.arguments else {}),
        }


def _parse_number(value: Any) -> Any:
    """Return a number for a text such as 1e-4, which is no number in YAML. Other values are returned unchanged."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def read_tuning(content: Any, axis: Any, label: str) -> Tuning:
    """Read the section `tune`.

    Args:
        content: The section.
        axis: Content of the tuned axis: `key` or `arguments`. Its values are in the section.
        label: Name of the file, for errors.

    Raises:
        ConfigError: The section or the axis is invalid.
    """
    if not isinstance(content, dict) or not {"axis", "values", "seeds", "by"} <= set(content) <= KEYS:
        found = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)
        raise ConfigError(
            f"{label} tune: found {found}, expected axis, values, seeds, by, and optionally mode, widen and arguments."
        )
    name = content["axis"]
    if not isinstance(axis, dict) or set(axis) not in ({"key"}, {"arguments"}):
        found = "no such axis" if axis is None else ", ".join(map(str, axis)) if isinstance(axis, dict) else repr(axis)
        raise ConfigError(
            f"{label} axes.{name}: found {found}, expected key or arguments alone. The values of a tuned axis are in "
            "tune."
        )
    for key in ("values", "seeds"):
        if not isinstance(content[key], list):
            raise ConfigError(f"{label} tune.{key}: found {content[key]!r}, expected a list.")
    values = [_parse_number(value) for value in content["values"]]
    tuned = read_axis(str(name), {**axis, "values": values}, f"{label} axes.{name}")
    options = {key: content[key] for key in ("mode", "widen") if key in content}
    arguments = tuple(read_arguments(content.get("arguments", []), f"{label} tune.arguments"))
    seeds = tuple(as_json(seed, f"{label} tune.seeds") for seed in content["seeds"])
    return Tuning(tuned, seeds, str(content["by"]), **options, arguments=arguments)


class Outcome(NamedTuple):
    """The state of a tuning cell."""

    cell: str
    status: Literal["scored", "diverged", "failed", "pending"]
    """`diverged`: the loss or the score is not a finite number. Such a value is worse than all others. `failed`: the
    cell ended with another error. `pending`: the cell has not ended."""
    score: float = math.nan


@dataclass(frozen=True)
class Choice:
    """The tuning of one group of cells."""

    group: Mapping[str, Any]
    """Value of the group on each axis."""
    outcomes: Mapping[float, tuple[Outcome, ...]]
    """Outcomes of the tuning seeds by value, in rising order of the values."""
    value: float | None
    """The chosen value. None: a cell has failed, or all values have diverged."""

    @property
    def edge(self) -> Literal["smallest", "largest"] | None:
        """The end of the range that the chosen value is at. None: values on both sides of it were tried."""
        values = list(self.outcomes)
        if self.value is None or len(values) == 1:
            return None
        return {values[0]: "smallest", values[-1]: "largest"}.get(self.value)  # type: ignore[return-value]

    @property
    def note(self) -> str:
        """What a reader has to know about the choice. Empty: nothing."""
        cells = {each.cell: each.status for outcomes in self.outcomes.values() for each in outcomes}
        failed, diverged = ([cell for cell, each in cells.items() if each == name] for name in ("failed", "diverged"))
        notes = []
        if failed:
            notes.append(f"no value is chosen and no result is run, because {' and '.join(failed)} failed")
        elif self.value is None:
            notes.append("no value is chosen and no result is run, because all values diverged")
        elif self.edge:
            notes.append(f"the {self.edge} value that was tried, so that the best one may be beyond it")
        if diverged and self.value is not None:
            notes.append(f"diverged: {', '.join(diverged)}")
        return "; ".join(notes)


def mean_score(outcomes: Sequence[Outcome]) -> float | None:
    """Return the mean over tuning seeds. None: the score of a seed is missing."""
    scores = [outcome.score for outcome in outcomes if outcome.status == "scored"]
    return fmean(scores) if len(scores) == len(outcomes) and scores else None


def choose(group: Mapping[str, Any], outcomes: Mapping[float, Sequence[Outcome]], mode: str) -> Choice:
    """Choose the value of a group that has the best mean score over the tuning seeds.

    Of values with equal means, the one nearest to the middle of all values in their order is chosen, so that a tie
    does not count as a best value at an edge. Of two that are equally near, it is the smaller one. A value with a
    diverged seed is not chosen. If a cell has failed for another reason, no value is chosen: a mean over fewer seeds
    would not be comparable.

    Args:
        group: Value of the group on each axis.
        outcomes: Outcomes of the tuning seeds by value. None of them is pending.
        mode: `max` or `min`.
    """
    ordered = {value: tuple(outcomes[value]) for value in sorted(outcomes)}
    sign = 1 if mode == "max" else -1
    means = {value: mean for value, each in ordered.items() if (mean := mean_score(each)) is not None}
    has_failed = any(outcome.status == "failed" for each in ordered.values() for outcome in each)
    if has_failed or not means:
        return Choice(group, ordered, None)
    best = max(sign * mean for mean in means.values())
    values = list(ordered)
    tied = [value for value, mean in means.items() if math.isclose(sign * mean, best, rel_tol=1e-12, abs_tol=1e-15)]
    chosen = min(tied, key=lambda value: (abs(2 * values.index(value) - (len(values) - 1)), value))
    return Choice(group, ordered, chosen)


def added_values(choices: Sequence[Choice]) -> list[float]:
    """Return values to add, because the best value of a group is the smallest or the largest one.

    A value is added at each end that is the best of any group. Its ratio to the end is that of the end and the value
    next to it. It is rounded to two digits, or to an integer if all values are integers. No value is added at an end
    beyond which rounding leaves none, such as an integer below 1.

    Args:
        choices: The choices of all groups, over the same values.
    """
    values, edges = list(choices[0].outcomes), {choice.edge for choice in choices}
    are_integers = all(isinstance(value, int) for value in values)
    added = []
    if "smallest" in edges:
        below = _rounded(values[0] ** 2 / values[1], are_integers)
        added += [below] if 0 < below < values[0] else []
    if "largest" in edges:
        above = _rounded(values[-1] ** 2 / values[-2], are_integers)
        added += [above] if values[-1] < above < math.inf else []
    return added


def _rounded(value: float, is_integer: bool) -> float:
    return round(value) if is_integer else float(f"{value:.2g}")
