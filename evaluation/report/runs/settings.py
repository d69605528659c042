"""Settings of runs under the names of their flags, and the settings in which runs differ."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Value = str | int | float
"""A setting's value in a table: a number or a text."""

WITHOUT_INFLUENCE = (
    # Where a run reads and writes.
    "config",
    "ckpt_path",
    "weights_only",
    "trainer.default_root_dir",
    "trainer.logger",
    "trainer.model_registry",
    "data.cache_dir",
    # What a run prints and logs.
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.enable_autolog_hparams",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "trainer.num_sanity_val_steps",
    "data.print_pair",
    "callbacks.AnswerSamples",
    "callbacks.ChosenRewardWarning",
    "callbacks.CodeExplanations",
    "callbacks.CodebookMonitor",
    "callbacks.GracefulStop",
    "callbacks.LearningRateMonitor",
    "callbacks.PreferenceAccuracy",
    "callbacks.PreferenceProgressBar",
    "callbacks.ResourceMonitor",
    "callbacks.RunSummary",
    "callbacks.StepProfile",
    "callbacks.WritePredictions",
    # How fast it runs.
    "data.num_workers",
)
"""Settings that cannot change the metrics of a run, with the arguments below them. Runs may differ in them."""
SEED = "seed_everything"
WEIGHTS = "weights"
"""Name of the kind of weights that a run's metrics are of, such as `last` or `best`. It is added to the settings."""
BATCH_LIMITS = tuple(f"trainer.limit_{stage}_batches" for stage in ("train", "val", "test", "predict"))
ALL = "all"
"""Value of a setting among `BATCH_LIMITS` that uses all batches."""
SHARES = (*BATCH_LIMITS, "trainer.overfit_batches", "trainer.val_check_interval", "callbacks.ModelPruning.amount")
"""Settings in which 1 is one item, and 1.0 is all of them."""
WHOLE = "1.0"
"""Value 1.0 of a setting among `SHARES`: a text, because the number is equal to 1."""


def as_value(value: Any) -> Value:
    """Convert any value for a table: to a number if possible, to `none`, `true` or `false`, or to text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return "none" if value == "null" else _parse_number(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def as_share(value: Any) -> Value:
    """Convert a value of one of `SHARES`."""
    converted = as_value(value)
    return WHOLE if isinstance(converted, float) and converted == 1 else converted


def as_setting(name: str, value: Any) -> Value:
    """Convert the value of a setting. Numbers are equal if they mean the same: a learning rate of 1 is one of 1.0."""
    converted = as_share(value) if name in SHARES else as_value(value)
    return ALL if name in BATCH_LIMITS and converted in ("none", WHOLE) else converted


def _parse_number(text: str) -> Value:
    for number_type in (int, float):
        try:
            number = number_type(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def flatten(config: Mapping[str, Any]) -> dict[str, Value]:
    """Flatten a config to the names of its flags: `model` is the class, `model.beta` one of its arguments.

    Args:
        config: The content of `config.yaml`. In a list of classes, each class has its own name:
            `callbacks.LabelFlipNoise.rate`.
    """
    # An empty list of callbacks is the same as none.
    return dict(_flatten("", {name: value for name, value in config.items() if name != "callbacks" or value}))


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Value]]:
    match value:
        case {"class_path": str(path)}:
            yield name, path.rpartition(".")[2]
            yield from _flatten(name, value.get("init_args") or {})
        case dict():
            for key, entry in value.items():
                yield from _flatten(f"{name}.{key}" if name else str(key), entry)
        case [{"class_path": str()}, *_] if all(isinstance(entry, dict) and "class_path" in entry for entry in value):
            yield from _flatten_classes(name, value)
        case _:
            yield name, as_setting(name, value)


def _flatten_classes(name: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Value]]:
    counts: dict[str, int] = {}
    for entry in entries:
        class_name = entry["class_path"].rpartition(".")[2]
        counts[class_name] = counts.get(class_name, 0) + 1
        suffix = "" if counts[class_name] == 1 else f"-{counts[class_name]}"
        yield from _flatten(f"{name}.{class_name}{suffix}", entry)


def is_without_influence(name: str) -> bool:
    """Return true if a setting is among `WITHOUT_INFLUENCE`."""
    return any(name == listed or name.startswith((f"{listed}.", f"{listed}-")) for listed in WITHOUT_INFLUENCE)


def common_settings(runs: Sequence[Mapping[str, Value]]) -> dict[str, Value]:
    """Return the settings that all runs have with the same value."""
    if not runs:
        return {}
    return {
        name: value for name, value in runs[0].items() if all(name in run and run[name] == value for run in runs[1:])
    }
