"""Pairs that are scored and that the scored policy was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lpc_lightning.data import DataError, PreferenceDataModule, PreferenceMixture
from lpc_lightning.data.preference_data import StageRows
from lpc_lightning.data.sources.locations import HubDataset, open_location
from lpc_lightning.data.sources.report import DataReport
from lpc_lightning.data.sources.splits import pair_rank
from lpc_lightning.errors import ConfigError
from lpc_lightning.inference.run_data import data_of_run
from lpc_lightning.types import PreferenceExample

KEY = "trained_on"
"""Entry of a task's record: the number of scored pairs that are training pairs of the run."""


def training_pairs(origin: Mapping[str, Any]) -> frozenset[int] | None:
    """Return hashes of the training pairs of the run that wrote a policy, whatever their labels.

    Args:
        origin: Result of `checkpoint_origin`, or `training.json` of an exported folder under the key `training`.

    Returns:
        None if they cannot be known here: no data is recorded, its files are gone, it is from a hub, or
        `data_of_run` refuses it.
    """
    settings = origin.get("training", origin).get("data")
    if settings is None:
        return None
    try:
        data = data_of_run(settings)
        if any(_is_on_hub(rows) for rows in _rows(data)):
            return None
        source = data.source("train")
        return None if source is None else frozenset(_hash(example) for example in source.read(DataReport()))
    except (ConfigError, DataError, OSError, ValueError):
        return None


def count_trained(scored: PreferenceDataModule, trained: frozenset[int]) -> int:
    """Return how many of the test pairs of a data module are among the training pairs.

    Args:
        scored: The data, whose test pairs have been scored.
        trained: Result of `training_pairs`.
    """
    source = scored.source("test")
    assert source is not None
    examples = list(source.read(DataReport()))  # the token cache does not hold texts
    return sum(_hash(examples[index]) in trained for index in scored.pairs["test"].indices)


def overlap_sentence(trained: int, pairs: int) -> str:
    """Return the sentence of the console and of the written reports."""
    return f"{trained} of {pairs} pairs are training pairs of this run"


def overlaps(records: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each task whose pairs are partly training pairs.

    Args:
        records: Records of a model's results, by task.
    """
    return [
        f"{task}: {overlap_sentence(record[KEY], record['items'])}."
        for task, record in records.items()
        if record.get(KEY)
    ]


def _rows(data: PreferenceDataModule) -> list[StageRows]:
    """Return the files of a data module, those of each data set of a mixture."""
    parts = list(data.sources.values()) if isinstance(data, PreferenceMixture) else [data]
    return [part for part in parts if isinstance(part, StageRows)]


def _is_on_hub(rows: StageRows) -> bool:
    """Return whether a path is a hub name. Nothing is looked up there."""
    paths = rows.path.values() if isinstance(rows.path, dict) else [rows.path]
    return any(isinstance(open_location(path, rows.config), HubDataset) for path in paths)


def _hash(example: PreferenceExample) -> int:
    """Return a hash of the prompt, without a name written into it, and of both answers in either order."""
    return pair_rank(replace(example, prompt=example.question or example.prompt))
