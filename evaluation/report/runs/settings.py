"""The settings of runs as flat names, as they stand in flags, and those in which runs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

Value = str | int | float
"""A setting's value in a table: a number, or its text."""

PLACES = ("config", "ckpt_path", "weights_only", "trainer.default_root_dir", "trainer.logger", "data.cache_dir")
"""Where a run reads and writes, which does not decide what it finds."""
SEED = "seed_everything"


def as_value(value: Any) -> Value:
    """Any value as a table shows it: a number where it is one, `none`, `true` and `false`, or text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return "none" if value == "null" else _number(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _number(text: str) -> Value:
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def dotted(config: Mapping[str, Any]) -> dict[str, Value]:
    """A config's settings by the names of their flags: `model` is the class, `model.beta` one of its arguments.

    Args:
        config: As `config.yaml` holds it. Of a list of classes each stands under its name:
            `lpc_lightning.callbacks.LabelFlipNoise.rate`.
    """
    # No callbacks and an empty list of them are the same.
    return dict(_flat("", {name: value for name, value in config.items() if name != "callbacks" or value}))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Value]]:
    match value:
        case {"class_path": str(path)}:
            yield name, path.rpartition(".")[2]
            yield from _flat(name, value.get("init_args") or {})
        case dict():
            for key, entry in value.items():
                yield from _flat(f"{name}.{key}" if name else str(key), entry)
        case [{"class_path": str()}, *_] if all(isinstance(entry, dict) and "class_path" in entry for entry in value):
            yield from _flat_classes(name, value)
        case _:
            yield name, as_value(value)


def _flat_classes(name: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Value]]:
    seen: dict[str, int] = {}
    for entry in entries:
        short = entry["class_path"].rpartition(".")[2]
        seen[short] = seen.get(short, 0) + 1
        place = f"{name}.{short}" if seen[short] == 1 else f"{name}.{short}-{seen[short]}"
        yield from _flat(place, entry)


def differing(runs: Sequence[Mapping[str, Value]]) -> list[str]:
    """Names of the settings in which runs differ, in the order of the first run that has them.

    A setting that follows from another one is left out: an argument that goes with the class that it belongs to (SimPO
    has a beta of its own), and a seed that goes with the run's seed.

    Args:
        runs: The settings of each run, from `dotted`.
    """
    names = [name for name in dict.fromkeys(name for run in runs for name in run) if name not in (SEED, *PLACES)]
    varying = [name for name in names if len({run.get(name) for run in runs}) > 1]
    return [name for name in varying if not any(_follows(name, from_, runs) for from_ in _owners(name, varying))]


def _owners(name: str, varying: Sequence[str]) -> list[str]:
    """The classes above a setting, and the run's seed for what is a seed."""
    above = [other for other in varying if name.startswith(f"{other}.")]
    return [*above, SEED] if name.endswith("seed") else above


def _follows(name: str, other: str, runs: Sequence[Mapping[str, Value]]) -> bool:
    """Whether runs that agree in the other setting, which differs, agree in this one."""
    by_other: dict[Hashable, set[Hashable]] = {}
    for run in runs:
        by_other.setdefault(run.get(other), set()).add(run.get(name))
    return len(by_other) > 1 and all(len(values) == 1 for values in by_other.values())


def agreeing(runs: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """The settings that all runs have, with the same value."""
    if not runs:
        return {}
    return {
        name: value for name, value in runs[0].items() if all(name in run and run[name] == value for run in runs[1:])
    }
